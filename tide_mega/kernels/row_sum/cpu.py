"""Row gradients accumulated on CPU, where torch's indexed addition processes its entries in order.

Dimensions: W rows owned here, Q rows received, K memory blocks, D width.
"""

from torch import Tensor


def add_rows(total_WKD: Tensor, rows_Q: Tensor, received_QKD: Tensor, divisor: int) -> None:
    """Like `tide_mega.kernels.row_sum.add_rows`."""
    wide_QKD = received_QKD.float()
    total_WKD.index_add_(0, rows_Q, wide_QKD if divisor == 1 else wide_QKD / divisor)
