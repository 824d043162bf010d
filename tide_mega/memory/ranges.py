"""Converts cyclic row ownership to contiguous ranges and back; sums over the rows that a ZeRO range touches.

With cyclic ownership owner g of G holds rows g, g + G, ...; checkpoints store contiguous ranges, which any other
number of owners can cut again (`OwnershipExchange`).

Dimensions: V vocabulary, W rows of an owner (the last may lie beyond V), R rows of a range, K blocks, D width.
For a ZeRO range of the flattened tables [W, K, D] a row is that of one block: row u of W x K is row u // K of
block u % K, and U counts the rows that the range touches, in whole or in part.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import pad


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
        return len(range(first + (owner - first) % len(self.owners), last, len(self.owners)))

    def _positions(self) -> list[slice]:
        """Return the positions of each member's rows in this process's range."""
        places = [slice(0, 0)] * self.group.size()
        if self.owner is not None:
            first, last = self.range_of(self.owner)
            for other, rank in enumerate(self.owners):
                places[rank] = slice((other - first) % len(self.owners), last - first, len(self.owners))
        return places


PIECE = 2**24
"""Elements processed at a time, so that a bf16 range is never widened as a whole."""


def row_squares(values: Tensor, start: int, width: int) -> tuple[int, Tensor]:
    """Sum the squares of each row of D elements in a range; rows at its ends may be partial.

    Args:
        values: the range's elements, 1-D.
        start: offset of the first of them in the flattened [..., D].
        width: D.

    Returns:
        The first row that is touched, and the sums [U] in fp64.
    """
    head = min(-start % width, values.numel())
    body = (values.numel() - head) // width * width
    parts = [values[:head]] if head else []
    tail = values[head + body :]
    edges = [_squares(part.view(1, -1)) for part in (*parts, *([tail] if tail.numel() else []))]
    rows_UD = values[head : head + body].view(-1, width)
    whole = [_squares(piece) for piece in rows_UD.split(max(PIECE // width, 1))]
    return start // width, torch.cat([*edges[: len(parts)], *whole, *edges[len(parts) :]])


def _squares(rows_UD: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows_UD, dim=1, dtype=torch.float32).double().square()


def sum_by_block(first: int, squares_U: Tensor, num_blocks: int) -> Tensor:
    """Sum the values [U] of rows starting at `first` by block [K], in fixed order and without atomics."""
    before = first % num_blocks
    after = -(before + squares_U.numel()) % num_blocks
    return pad(squares_U, (before, after)).view(-1, num_blocks).sum(0)
