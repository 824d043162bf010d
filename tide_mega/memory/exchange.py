"""Fetching rows from the vocab-parallel tables, and sending their gradients home.

Shapes: U distinct types, W rows of the table this process owns, K blocks, D width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from tide_mega.parallel.groups import sum_over


def first_owned_row(rows_per_owner: int, group: ProcessGroup) -> int:
    """Row of the whole table that this process's shard begins with."""
    return group.rank() * rows_per_owner


class _GatherRows(torch.autograd.Function):
    """Masked lookup in the own shard, then a sum over the owners: each row has exactly one."""

    @staticmethod
    def forward(ctx: Any, shard_WKD: Tensor, ids_U: Tensor, group: ProcessGroup) -> Tensor:
        local_U = ids_U - first_owned_row(shard_WKD.size(0), group)
        owned_U = (local_U >= 0) & (local_U < shard_WKD.size(0))
        if group.size() == 1:
            rows_UKD = shard_WKD[local_U]
        else:
            rows_UKD = shard_WKD.new_zeros(ids_U.numel(), *shard_WKD.shape[1:])
            rows_UKD[owned_U] = shard_WKD[local_U[owned_U]]
            sum_over(group, rows_UKD)
        ctx.save_for_backward(local_U, owned_U)
        ctx.shard_shape = shard_WKD.shape
        return rows_UKD

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (grad_UKD,) = grad_outputs
        local_U, owned_U = ctx.saved_tensors
        grad_WKD = grad_UKD.new_zeros(ctx.shard_shape)
        # ids are distinct, so rows are written, not accumulated: exact and deterministic.
        grad_WKD[local_U[owned_U]] = grad_UKD[owned_U]
        return grad_WKD, None, None


def gather_rows(shard_WKD: Tensor, ids_U: Tensor, group: ProcessGroup) -> Tensor:
    """Return the rows [U, K, D] of the distinct `ids_U` from tables sharded by rows over `group`.

    Every member of the group asks for the same ids. The backward pass keeps, on each owner, the gradient of
    the rows it owns; the gradient given to it must already be the whole one, equal on all members.

    Raises:
        IndexError: an id is outside the tables.
    """
    check_ids(ids_U, shard_WKD.size(0) * group.size())
    return _GatherRows.apply(shard_WKD, ids_U, group)


def check_ids(ids_U: Tensor, vocab_size: int) -> None:
    """Refuse ascending ids that the tables do not have.

    Raises:
        IndexError: naming the span of the ids and the rows of the tables.
    """
    if ids_U.numel() and (int(ids_U[0]) < 0 or int(ids_U[-1]) >= vocab_size):
        raise IndexError(
            f"token ids span {int(ids_U[0])}..{int(ids_U[-1])}, but the memory tables have {vocab_size} rows: "
            "the data was tokenised with a larger vocabulary than model.vocab_size."
        )
