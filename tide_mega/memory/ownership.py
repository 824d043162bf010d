"""Which owner has which row: with `memory.owners=tensor_data` row v belongs to owner v mod G, as its row v div G.

The G owners are the ranks of tensor x data on the first pipeline stage, in the order of their group. Tokenizers
number their types roughly by frequency, so owners of contiguous ids would serve very different loads: with 32
owners and 32,768 English tokens the busiest would serve 9 times the mean; with cyclic ownership it is 1.1 times.

Checkpoints store contiguous ranges, which any other number of owners can cut again (`OwnershipExchange`).

Dimensions: V vocabulary, W rows of an owner (the last may lie beyond V), R rows of a range, K blocks, D width.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def owner_of(ids: Tensor, owners: int) -> Tensor:
    """Return the owner, from 0, of the row of each id."""
    return ids % owners


def row_at_owner(ids: Tensor, owners: int) -> Tensor:
    """Return the place of each id's row among its owner's."""
    return ids // owners


def rows_of_owner(vocab_size: int, owners: int) -> int:
    """Return W, the rows that each owner stores."""
    return math.ceil(vocab_size / owners)


def owned_within(owner: int, owners: int, first: int) -> slice:
    """Return the places of an owner's rows among contiguous rows that begin with row `first`."""
    return slice((owner - first) % owners, None, owners)


@dataclass(frozen=True)
class OwnershipExchange:
    """One exchange among the owners; processes of `group` that own nothing take part without rows."""

    group: ProcessGroup
    """Group for host tensors; may include processes that own nothing."""
    owners: tuple[int, ...]
    """The owners' ranks in `group`, ascending."""
    vocab_size: int

    def range_of(self, owner: int) -> tuple[int, int]:
        """Return the half-open range (first, last + 1) of an owner's contiguous rows."""
        each = math.ceil(self.vocab_size / len(self.owners))
        first = min(owner * each, self.vocab_size)
        return first, min(first + each, self.vocab_size)

    @property
    def owner(self) -> int | None:
        """This process's index among the owners; None if it owns nothing."""
        rank = self.group.rank()
        return self.owners.index(rank) if rank in self.owners else None

    def to_range(self, rows_WKD: Tensor | None, row_shape: tuple[int, ...]) -> Tensor:
        """Exchange this owner's cyclic rows for its contiguous range [R, K, D]; collective over `group`.

        Args:
            rows_WKD: this owner's rows; None on a process that owns nothing, which receives no rows.
            row_shape: (K, D), the same on all processes.
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
        """Inverse of `to_range`: return this owner's rows within the vocabulary, ascending; collective."""
        dealt, ranged = self._splits()
        parts = [rows_RKD[positions] for positions in self._positions()]
        received = rows_RKD.new_empty(sum(dealt), *row_shape)
        dist.all_to_all_single(received, torch.cat(parts), dealt, ranged, group=self.group)
        return received

    def _splits(self) -> tuple[list[int], list[int]]:
        """Return the rows that we own of each member's range, and that each member owns of our range."""
        dealt, ranged = [0] * self.group.size(), [0] * self.group.size()
        if self.owner is not None:
            for other, rank in enumerate(self.owners):
                dealt[rank] = self._count(self.owner, *self.range_of(other))
                ranged[rank] = self._count(other, *self.range_of(self.owner))
        return dealt, ranged

    def _count(self, owner: int, first: int, last: int) -> int:
        """Return the number of rows in first..last that belong to an owner."""
        return len(range(first, last)[owned_within(owner, len(self.owners), first)])

    def _positions(self) -> list[slice]:
        """Return the positions of each member's rows in this process's range."""
        places = [slice(0, 0)] * self.group.size()
        if self.owner is not None:
            first, last = self.range_of(self.owner)
            for other, rank in enumerate(self.owners):
                mine = owned_within(other, len(self.owners), first)
                places[rank] = slice(mine.start, last - first, mine.step)
        return places
