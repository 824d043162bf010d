"""Accumulates row gradients at the rows' owner, where several askers may have sent one for the same row.

Every version adds the entries of a row in the askers' order, so the result has the same bits in all versions and
from run to run.

Dimensions: W rows owned here, Q rows received, K memory blocks, D width, G askers.
"""

from torch import Tensor

from tide_mega.kernels.row_sum import cpu, naive

__all__ = ["add_rows"]


def add_rows(
    version: str, total_WKD: Tensor, rows_Q: Tensor, received_QKD: Tensor, counts_G: list[int], divisor: int
) -> None:
    """Add received / divisor, computed in fp32, to the rows of a table, in place.

    Args:
        version: naive, cpu or triton.
        total_WKD: fp32, contiguous.
        rows_Q: row of each entry, asker by asker; each asker names a row at most once.
        received_QKD: the entries, in any floating dtype.
        counts_G: number of entries of each asker.
        divisor: number of replicas over whose losses the mean is taken.
    """
    if version == "triton":
        from tide_mega.kernels.row_sum import triton

        triton.add_rows(total_WKD, rows_Q, received_QKD, divisor)
    elif version == "cpu":
        cpu.add_rows(total_WKD, rows_Q, received_QKD, divisor)
    elif version == "naive":
        naive.add_rows(total_WKD, rows_Q, received_QKD, counts_G, divisor)
    else:
        raise KeyError(version)
