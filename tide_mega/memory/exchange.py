"""Moves table rows between owners and askers: a gather from vocab-parallel tables, an all-to-all for cyclic ones.

`gather_rows` serves tables sharded over tensor parallelism (`memory.owners=tensor`). `Route` serves tables whose
rows each have one owner (`tensor_data`; which one, says `tide_mega.memory.ownership`).

Dimensions: U distinct types, or with `Route` the rows that this process asks for; W rows of the table that this
process owns; Q rows that others ask of this process; N tokens; G owners; K blocks; D width.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from tide_mega.memory.ownership import owner_of, row_at_owner
from tide_mega.memory.traffic import TrafficMeter
from tide_mega.parallel.groups import sum_over


def first_row_of_tensor_shard(rows_per_owner: int, group: ProcessGroup) -> int:
    """Return the first row, in the whole table, of this process's shard."""
    return group.rank() * rows_per_owner


class _GatherRows(torch.autograd.Function):
    """Masked lookup in the local shard, then a sum over the owners, of which each row has exactly one."""

    @staticmethod
    def forward(ctx: Any, shard_WKD: Tensor, ids_U: Tensor, group: ProcessGroup) -> Tensor:
        local_U = ids_U - first_row_of_tensor_shard(shard_WKD.size(0), group)
        if group.size() == 1:
            rows_UKD = shard_WKD[local_U]
        else:
            # No boolean indexing: the host would have to wait for the number of selected rows.
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
        # One extra row takes what others own. Ids are distinct, so rows are written and not accumulated, which is
        # exact and deterministic.
        grad_WKD = grad_UKD.new_zeros(rows + 1, *shape)
        grad_WKD[local_U] = grad_UKD
        return grad_WKD[:rows], None, None


def gather_rows(shard_WKD: Tensor, ids_U: Tensor, group: ProcessGroup) -> Tensor:
    """Return the rows [U, K, D] of the distinct `ids_U` from tables sharded by rows over `group`.

    Every member of the group must ask for the same ids, already checked by `plan_rows`. The backward pass keeps,
    on each owner, the gradient of the rows it owns; the incoming gradient must already be summed and equal on
    all members.
    """
    return _GatherRows.apply(shard_WKD, ids_U, group)


@dataclass(frozen=True)
class Asked:
    """Row counts exchanged between this process and each member, in rank order."""

    of: list[int]
    """Rows that this process asks of each owner."""
    by: list[int]
    """Rows that each member asks of this process."""

    @staticmethod
    def of_counts(counts_2G: list[int]) -> "Asked":
        """Split the result of `Owners.exchange_counts`."""
        members = len(counts_2G) // 2
        return Asked(counts_2G[:members], counts_2G[members:])


@dataclass(frozen=True)
class Owners:
    """The owners' group, and the tensor ranks of a replica, each of which asks for an equal share of its rows."""

    group: ProcessGroup
    tensor: ProcessGroup

    def exchange_counts(self, distinct_N: Tensor, count_1: Tensor) -> Tensor:
        """Tell every owner how many rows this process will ask of it; collective, without host synchronisation.

        Args:
            distinct_N: the replica's distinct ids, ascending, in the first `count_1` places.
            count_1: their number, on the device.

        Returns:
            Rows asked of each owner, followed by rows that each member asks of this process [2G].
        """
        members, sharers = self.group.size(), self.tensor.size()
        place_N = torch.arange(distinct_N.numel(), device=distinct_N.device)
        each_1 = (count_1 + sharers - 1) // sharers
        first_1 = self.tensor.rank() * each_1
        is_mine_N = (place_N >= first_1) & (place_N < torch.minimum(first_1 + each_1, count_1))
        of_G = torch.zeros(members, dtype=torch.int64, device=distinct_N.device)
        of_G.scatter_add_(0, owner_of(distinct_N, members), is_mine_N.long())
        if members == 1:
            return torch.cat((of_G, of_G))
        by_G = torch.empty_like(of_G)
        dist.all_to_all_single(by_G, of_G, group=self.group)
        return torch.cat((of_G, by_G))


def share(count: int, group: ProcessGroup) -> tuple[int, int]:
    """Return this member's range of `count` rows: equal parts, the last ones shorter or empty."""
    each = math.ceil(count / group.size())
    first = min(group.rank() * each, count)
    return first, min(first + each, count)


@dataclass(frozen=True)
class Route:
    """One exchange: `fetch` sends rows from owners to askers, `give_back` their gradients back."""

    group: ProcessGroup
    asked: Asked
    order_U: Tensor | None
    """Positions of the requested ids, owner by owner: the order in which rows travel. None for a single process,
    where nothing travels."""
    rows_Q: Tensor
    """Rows of the local shard that others ask for, asker by asker, ascending for each."""

    @classmethod
    def plan(cls, ids_U: Tensor, group: ProcessGroup, asked: Asked, meter: TrafficMeter) -> "Route":
        """Tell every owner which of its rows this process needs; collective over the owners.

        Args:
            ids_U: distinct ids that this process asks for, ascending; may be empty.
            group: the owners.
            asked: row counts from the step's plan.
            meter: counts the bytes of the ids.
        """
        members = group.size()
        if members == 1:
            return cls(group, asked, None, ids_U)
        order_U = torch.argsort(owner_of(ids_U, members), stable=True)
        wanted_Q = ids_U.new_empty(sum(asked.by))
        dist.all_to_all_single(wanted_Q, ids_U[order_U], asked.by, asked.of, group=group)
        route = cls(group, asked, order_U, row_at_owner(wanted_Q, members))
        route._count(meter, "ids", ids_U.element_size(), outward=asked.of, inward=asked.by)
        return route

    def fetch(self, owned_QKD: Tensor, meter: TrafficMeter) -> "PendingRows":
        """Start sending the rows that others asked for and receiving our own; `wait` returns them [U, K, D]."""
        if self.order_U is None:
            return PendingRows(owned_QKD)
        rows_UKD = owned_QKD.new_empty(sum(self.asked.of), *owned_QKD.shape[1:])
        work = dist.all_to_all_single(
            rows_UKD, owned_QKD.contiguous(), self.asked.of, self.asked.by, group=self.group, async_op=True
        )
        width = owned_QKD[:1].nbytes if len(owned_QKD) else rows_UKD[:1].nbytes
        self._count(meter, "rows", width, outward=self.asked.by, inward=self.asked.of)
        return PendingRows(rows_UKD, self.order_U, work, owned_QKD)

    def give_back(self, grad_UKD: Tensor, meter: TrafficMeter) -> Tensor:
        """Send gradients to the owners; return those of the local shard's `rows_Q` [Q, K, D]."""
        if self.order_U is None:
            return grad_UKD
        received_QKD = grad_UKD.new_empty(sum(self.asked.by), *grad_UKD.shape[1:])
        dist.all_to_all_single(
            received_QKD, grad_UKD[self.order_U], self.asked.by, self.asked.of, group=self.group
        )
        width = grad_UKD[:1].nbytes if len(grad_UKD) else received_QKD[:1].nbytes
        self._count(meter, "row gradients", width, outward=self.asked.of, inward=self.asked.by)
        return received_QKD

    def _count(
        self, meter: TrafficMeter, kind: str, width: int, *, outward: list[int], inward: list[int]
    ) -> None:
        here = self.group.rank()
        sent, received = sum(outward) - outward[here], sum(inward) - inward[here]
        meter.add(kind, sent * width, received * width)


@dataclass
class PendingRows:
    """Rows in flight."""

    rows_UKD: Tensor
    order_U: Tensor | None = None
    work: dist.Work | None = None
    kept_QKD: Tensor | None = None
    """The send buffer, kept alive until the transfer is done."""

    def wait(self) -> Tensor:
        """Wait for the rows and return them [U, K, D] in the order of the requested ids."""
        if self.order_U is None or self.work is None:
            return self.rows_UKD
        self.work.wait()
        in_order_UKD = torch.empty_like(self.rows_UKD)
        in_order_UKD[self.order_U] = self.rows_UKD
        return in_order_UKD
