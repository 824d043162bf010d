"""A range of a flattened weight as boxes of canonical tensors, which any other topology can read."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from tide_mega.model.canonical import Box, LocalWeight


@dataclass(frozen=True)
class Part:
    """A box, and where its elements begin in the range it was cut from."""

    box: Box
    start: int

    @property
    def numel(self) -> int:
        """Elements, which lie one after the other."""
        return math.prod(self.box.size)


def parts_of(weight: LocalWeight, first: int, last: int) -> Iterator[Part]:
    """Cut elements first..last of a flattened weight into boxes of canonical tensors."""
    start = 0
    for box in weight.boxes:
        end = start + math.prod(box.size)
        low, high = max(start, first), min(end, last)
        if low < high:
            for offset, size in boxes_of_range(box.size, low - start, high - start):
                at = start + _flat(offset, box.size) - first
                place = tuple(a + b for a, b in zip(box.offset, offset, strict=True))
                yield Part(Box(box.name, box.shape, place, size), at)
        start = end


def boxes_of_range(
    shape: tuple[int, ...], first: int, last: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut elements first..last of a row-major array into the fewest boxes (offset, size), in order."""
    if first >= last:
        return
    inner = math.prod(shape[1:])
    if inner == 1 and len(shape) == 1:
        yield (first,), (last - first,)
        return
    row, last_row = first // inner, last // inner
    if first % inner:  # the rest of a row
        end = min(last, (row + 1) * inner)
        for offset, size in boxes_of_range(shape[1:], first % inner, end - row * inner):
            yield (row, *offset), (1, *size)
        row += 1
    if row < last_row:
        yield (row, *(0,) * (len(shape) - 1)), (last_row - row, *shape[1:])
    if last % inner and row <= last_row:  # the beginning of a row
        for offset, size in boxes_of_range(shape[1:], 0, last % inner):
            yield (last_row, *offset), (1, *size)


def _flat(offset: tuple[int, ...], shape: tuple[int, ...]) -> int:
    position = 0
    for at, length in zip(offset, shape, strict=True):
        position = position * length + at
    return position
