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
        if group.size() == 1:
            rows_UKD = shard_WKD[local_U]
        else:
            # No row is picked by a mask: the host would have to wait to know how many there are.
            last = shard_WKD.size(0) - 1
            owned_U = (local_U >= 0) & (local_U <= last)
            rows_UKD = torch.where(owned_U[:, None, None], shard_WKD[local_U.clamp(0, last)], 0)
            local_U = torch.where(owned_U, local_U, last + 1)
            sum_over(group, rows_UKD)
        ctx.save_for_backward(local_U)
        ctx.shard_shape = shard_WKD.shape
        return rows_UKD

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (grad_UKD,) = grad_outputs
        (local_U,) = ctx.saved_tensors
        rows, *shape = ctx.shard_shape
        # One row more takes what others own. Ids are distinct, so rows are written, not accumulated: exact and
        # deterministic.
        grad_WKD = grad_UKD.new_zeros(rows + 1, *shape)
        grad_WKD[local_U] = grad_UKD
        return grad_WKD[:rows], None, None


def gather_rows(shard_WKD: Tensor, ids_U: Tensor, group: ProcessGroup) -> Tensor:
    """Return the rows [U, K, D] of the distinct `ids_U` from tables sharded by rows over `group`.

    Every member of the group asks for the same ids, which `plan_rows` has checked. The backward pass keeps, on
    each owner, the gradient of the rows it owns; the gradient given to it must already be whole, the same on all.
    """
    return _GatherRows.apply(shard_WKD, ids_U, group)
