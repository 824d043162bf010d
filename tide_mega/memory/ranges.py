"""Sums over the table rows that a range of flattened elements touches, as ZeRO cuts tables.

Shapes: K blocks, D width, U rows of a block that a range touches, whole or in part: row u of W x K is row u // K
of block u % K.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

PIECE = 2**24
"""Elements taken at a time, so that bf16 is not widened all at once."""


def row_squares(values: Tensor, start: int, width: int) -> tuple[int, Tensor]:
    """Sum the squares of each row of D elements within a range; rows at its ends may be parts.

    Args:
        values: the elements, 1-D.
        start: of the first of them in the flattened [..., D].
        width: D.

    Returns:
        The first row, and the sums [U] in fp64.
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
    """Add up the rows [U] from row `first` on, block by block [K]: sums of fixed order, no atomics."""
    before = first % num_blocks
    after = -(before + squares_U.numel()) % num_blocks
    return pad(squares_U, (before, after)).view(-1, num_blocks).sum(0)
