"""Row gradients accumulated in plain torch, one asker after the other: the oracle.

Dimensions: W rows owned here, Q rows received, R rows of one asker, K memory blocks, D width, G askers.
"""

from torch import Tensor


def add_rows(
    total_WKD: Tensor, rows_Q: Tensor, received_QKD: Tensor, counts_G: list[int], divisor: int
) -> None:
    """Like `tide_mega.kernels.row_sum.add_rows`; one indexed addition per asker, whose rows are distinct."""
    pieces = zip(rows_Q.split(counts_G), received_QKD.split(counts_G), strict=True)
    for rows_R, received_RKD in pieces:
        total_WKD[rows_R] += received_RKD.float() / divisor
