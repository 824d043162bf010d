"""From rows dealt out to their owners in turn to contiguous ranges of the table, and back.

Owner g of G keeps rows g, g + G, ...; storage wants ranges that any other number of owners can cut again.

Shapes: V vocabulary, W rows of an owner (the last may lie beyond V), R rows of a range, K blocks, D width.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Deal:
    """One exchange among the owners; processes of `group` that own nothing take part with nothing."""

    group: ProcessGroup
    """Moves host tensors; may be wider than the owners."""
    owners: tuple[int, ...]
    """Their ranks in `group`, in the owners' order, which ascends."""
    vocab_size: int

    def range_of(self, owner: int) -> tuple[int, int]:
        """Return first and last + 1 of an owner's contiguous rows."""
        each = math.ceil(self.vocab_size / len(self.owners))
        first = min(owner * each, self.vocab_size)
        return first, min(first + each, self.vocab_size)

    @property
    def owner(self) -> int | None:
        """This process among the owners."""
        rank = self.group.rank()
        return self.owners.index(rank) if rank in self.owners else None

    def to_range(self, rows_WKD: Tensor | None, row_shape: tuple[int, ...]) -> Tensor:
        """Exchange this owner's rows for the contiguous ones [R, K, D]; collective over `group`.

        Args:
            rows_WKD: None on a process that owns nothing, which gets no rows.
            row_shape: (K, D), the same everywhere.
        """
        dealt, ranged = self._splits()
        sent = torch.empty(0, *row_shape) if rows_WKD is None else rows_WKD[: sum(dealt)].contiguous()
        received = sent.new_empty(sum(ranged), *row_shape)
        dist.all_to_all_single(received, sent, ranged, dealt, group=self.group)
        rows_RKD = torch.empty_like(received)
        for positions, part in zip(self._positions(), received.split(ranged), strict=True):
            rows_RKD[positions] = part
        return rows_RKD

    def from_range(self, rows_RKD: Tensor, row_shape: tuple[int, ...]) -> Tensor:
        """Undo `to_range`: return this owner's rows within the vocabulary, in order; collective over `group`."""
        dealt, ranged = self._splits()
        parts = [rows_RKD[positions] for positions in self._positions()]
        received = rows_RKD.new_empty(sum(dealt), *row_shape)
        dist.all_to_all_single(received, torch.cat(parts), dealt, ranged, group=self.group)
        return received

    def _splits(self) -> tuple[list[int], list[int]]:
        """Rows this process has of each member's range, and rows each member has of this process's range."""
        dealt, ranged = [0] * self.group.size(), [0] * self.group.size()
        if self.owner is not None:
            for other, rank in enumerate(self.owners):
                dealt[rank] = self._count(self.owner, *self.range_of(other))
                ranged[rank] = self._count(other, *self.range_of(self.owner))
        return dealt, ranged

    def _count(self, owner: int, first: int, last: int) -> int:
        """Rows of first..last that an owner was dealt."""
        return len(range(first + (owner - first) % len(self.owners), last, len(self.owners)))

    def _positions(self) -> list[slice]:
        """Where each member's rows lie in this process's range."""
        places = [slice(0, 0)] * self.group.size()
        if self.owner is not None:
            first, last = self.range_of(self.owner)
            for other, rank in enumerate(self.owners):
                places[rank] = slice((other - first) % len(self.owners), last - first, len(self.owners))
        return places
