"""Which row goes between which owner and which asker, and the all-to-all that takes it there.

Rows are dealt out to the owners in turn: owner = id mod G, its row = id div G. Tokenizers number their types
roughly by frequency, so owners of neighbouring ids would serve very different loads: with 32 owners and 32,768
English tokens the busiest would serve 9 times the mean, dealt out in turn 1.1 times.

Shapes: U rows this process asks for, Q rows that others ask of this process, G owners, K blocks, D width.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from tide_mega.memory.meter import TrafficMeter


@dataclass(frozen=True)
class Asked:
    """How many rows go between this process and each member, in rank order."""

    of: list[int]
    """Rows this process asks of each owner."""
    by: list[int]
    """Rows each member asks of this process."""

    @staticmethod
    def of_counts(counts_2G: list[int]) -> "Asked":
        """Split what `Owners.exchange_counts` gave."""
        members = len(counts_2G) // 2
        return Asked(counts_2G[:members], counts_2G[members:])


@dataclass(frozen=True)
class Owners:
    """The owners, and the tensor ranks of a replica, each of which asks for an equal share of its rows."""

    group: ProcessGroup
    tensor: ProcessGroup

    def exchange_counts(self, distinct_N: Tensor, count_1: Tensor) -> Tensor:
        """Tell every owner how many rows this process will ask of it; collective, and nothing waits.

        Args:
            distinct_N: the replica's distinct ids, ascending, in the first `count_1` places.
            count_1: how many there are, on the device.

        Returns:
            Rows asked of each owner, then rows each member asks of this process [2G].
        """
        members, sharers = self.group.size(), self.tensor.size()
        place_N = torch.arange(distinct_N.numel(), device=distinct_N.device)
        each_1 = (count_1 + sharers - 1) // sharers
        first_1 = self.tensor.rank() * each_1
        is_mine_N = (place_N >= first_1) & (place_N < torch.minimum(first_1 + each_1, count_1))
        of_G = torch.zeros(members, dtype=torch.int64, device=distinct_N.device)
        of_G.scatter_add_(0, distinct_N % members, is_mine_N.long())
        if members == 1:
            return torch.cat((of_G, of_G))
        by_G = torch.empty_like(of_G)
        dist.all_to_all_single(by_G, of_G, group=self.group)
        return torch.cat((of_G, by_G))


def share(count: int, group: ProcessGroup) -> tuple[int, int]:
    """Return this member's part of `count` rows: equal parts, the last ones shorter or empty."""
    each = math.ceil(count / group.size())
    first = min(group.rank() * each, count)
    return first, min(first + each, count)


@dataclass(frozen=True)
class Route:
    """One exchange: rows travel owner to asker by `fetch`, their gradients back by `give_back`."""

    group: ProcessGroup
    asked: Asked
    order_U: Tensor | None
    """Positions of the asked ids, owner by owner: the order in which rows travel. None where the process is alone,
    and nothing travels."""
    rows_Q: Tensor
    """Rows of the own shard that others ask for, asker by asker, ascending for each."""

    @classmethod
    def plan(cls, ids_U: Tensor, group: ProcessGroup, asked: Asked, meter: TrafficMeter) -> "Route":
        """Tell every owner which of its rows this process needs; collective over the owners.

        Args:
            ids_U: distinct ids this process asks for, ascending; may be empty.
            group: the owners.
            asked: how many go where, as the step's plan found.
            meter: counts the ids that travel.
        """
        members = group.size()
        if members == 1:
            return cls(group, asked, None, ids_U)
        order_U = torch.argsort(ids_U % members, stable=True)
        wanted_Q = ids_U.new_empty(sum(asked.by))
        dist.all_to_all_single(wanted_Q, ids_U[order_U], asked.by, asked.of, group=group)
        route = cls(group, asked, order_U, wanted_Q // members)
        route._count(meter, "ids", ids_U.element_size(), outward=asked.of, inward=asked.by)
        return route

    def fetch(self, owned_QKD: Tensor, meter: TrafficMeter) -> "PendingRows":
        """Start sending the rows others asked for and receiving the own ones; `wait` gives [U, K, D]."""
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
        """Send gradients home; return those of the own shard's `rows_Q` [Q, K, D]."""
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
    """Rows under way."""

    rows_UKD: Tensor
    order_U: Tensor | None = None
    work: dist.Work | None = None
    kept_QKD: Tensor | None = None
    """What is being sent, held until it has left."""

    def wait(self) -> Tensor:
        """Return the rows [U, K, D] in the order of the asked ids, once they are here."""
        if self.order_U is None or self.work is None:
            return self.rows_UKD
        self.work.wait()
        in_order_UKD = torch.empty_like(self.rows_UKD)
        in_order_UKD[self.order_U] = self.rows_UKD
        return in_order_UKD
