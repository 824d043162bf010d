"""Sums over the rows that a ZeRO range of the flattened tables touches.

Dimensions: W rows of a shard, K blocks, D width. In a range of the flattened tables [W, K, D] a row is that of one
block: row u of W x K is row u // K of block u % K, and U counts the rows that the range touches, in whole or in
part.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

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
