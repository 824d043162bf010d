"""Rows added up on CPU, where torch's indexed addition goes through its entries in their order.

Shapes: W rows owned here, Q rows received, K memory blocks, D width.
"""

from torch import Tensor


def add_rows(total_WKD: Tensor, rows_Q: Tensor, received_QKD: Tensor, divisor: int) -> None:
    """As `tide_mega.kernels.row_sum.add_rows`."""
    wide_QKD = received_QKD.float()
    total_WKD.index_add_(0, rows_Q, wide_QKD if divisor == 1 else wide_QKD / divisor)
