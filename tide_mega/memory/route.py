"""Which row goes between which owner and which asker, and the all-to-all that takes it there.

Rows are dealt out to the owners in turn: owner = id mod G, its row = id div G. Tokenizers number their types
roughly by frequency, so owners of neighbouring ids would serve very different loads: with 32 owners and 32,768
English tokens the busiest would serve 9 times the mean, dealt out in turn 1.1 times.

Shapes: U rows this process asks for, Q rows that others ask of this process, G owners, K blocks, D width.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from tide_mega.memory.meter import TrafficMeter


@dataclass(frozen=True)
class Route:
    """One exchange: rows travel owner to asker by `fetch`, their gradients back by `give_back`."""

    group: ProcessGroup
    order_U: Tensor
    """Positions of the asked ids, owner by owner: the order in which rows travel."""
    asked_of: list[int]
    """Rows this process asks of each owner, in rank order."""
    asked_by: list[int]
    """Rows each member asks of this process."""
    rows_Q: Tensor
    """Rows of the own shard that others ask for, asker by asker, ascending for each."""

    @classmethod
    def plan(cls, ids_U: Tensor, group: ProcessGroup, meter: TrafficMeter) -> "Route":
        """Tell every owner which of its rows this process needs; collective over the owners.

        Args:
            ids_U: distinct ids this process asks for, ascending; may be empty.
            group: the owners.
            meter: counts the ids that travel.
        """
        members = group.size()
        owner_U = ids_U % members
        order_U = torch.argsort(owner_U, stable=True)
        counts_G = torch.bincount(owner_U, minlength=members)
        asked_G = torch.empty_like(counts_G)
        dist.all_to_all_single(asked_G, counts_G, group=group)
        asked_of, asked_by = counts_G.tolist(), asked_G.tolist()
        wanted_Q = ids_U.new_empty(sum(asked_by))
        dist.all_to_all_single(wanted_Q, ids_U[order_U], asked_by, asked_of, group=group)
        route = cls(group, order_U, asked_of, asked_by, wanted_Q // members)
        route._count(meter, "ids", ids_U.element_size(), outward=route.asked_of, inward=route.asked_by)
        return route

    def fetch(self, owned_QKD: Tensor, meter: TrafficMeter) -> "PendingRows":
        """Start sending the rows others asked for and receiving the own ones; `wait` gives [U, K, D]."""
        rows_UKD = owned_QKD.new_empty(sum(self.asked_of), *owned_QKD.shape[1:])
        work = dist.all_to_all_single(
            rows_UKD, owned_QKD.contiguous(), self.asked_of, self.asked_by, group=self.group, async_op=True
        )
        width = owned_QKD[:1].nbytes if len(owned_QKD) else rows_UKD[:1].nbytes
        self._count(meter, "rows", width, outward=self.asked_by, inward=self.asked_of)
        return PendingRows(rows_UKD, self.order_U, work, owned_QKD)

    def give_back(self, grad_UKD: Tensor, meter: TrafficMeter) -> list[tuple[Tensor, Tensor]]:
        """Send gradients home; return (rows of the own shard, gradient) of each member in rank order."""
        received_QKD = grad_UKD.new_empty(sum(self.asked_by), *grad_UKD.shape[1:])
        dist.all_to_all_single(
            received_QKD, grad_UKD[self.order_U], self.asked_by, self.asked_of, group=self.group
        )
        width = grad_UKD[:1].nbytes if len(grad_UKD) else received_QKD[:1].nbytes
        self._count(meter, "row gradients", width, outward=self.asked_of, inward=self.asked_by)
        pieces = zip(self.rows_Q.split(self.asked_by), received_QKD.split(self.asked_by), strict=True)
        return list(pieces)

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
    order_U: Tensor
    work: dist.Work
    kept_QKD: Tensor
    """What is being sent, held until it has left."""

    def wait(self) -> Tensor:
        """Return the rows [U, K, D] in the order of the asked ids, once they are here."""
        self.work.wait()
        in_order_UKD = torch.empty_like(self.rows_UKD)
        in_order_UKD[self.order_U] = self.rows_UKD
        return in_order_UKD
