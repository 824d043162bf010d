"""The dense fp32 gradient of the rows owned here, and which of them are not 0.

A step touches few rows of a large table (at 2,048 tokens about 8 % of 8,192). Only those are added up, measured,
scaled and cleared; the rest stays 0 from step to step, and dense AdamW reads it once.

Shapes: W rows owned here, Q rows received, K memory blocks, D width, G askers.
"""

import torch
from torch import Tensor

from tide_mega.kernels.row_sum import add_rows
from tide_mega.memory.ranges import row_squares, sum_by_block


class TableGradient:
    """A sum over readings and askers, until the optimizer has used it."""

    def __init__(self, like_WKD: Tensor, version: str) -> None:
        """Start from 0; `version` is the one that adds rows up: naive, cpu or triton."""
        self.sum_WKD = torch.zeros_like(like_WKD, requires_grad=False)
        self._version = version
        self._touched: list[Tensor] = []
        self._askers = 0

    def add(self, rows_Q: Tensor, received_QKD: Tensor, counts_G: list[int], replicas: int) -> None:
        """Add the mean over `replicas`; see `tide_mega.kernels.row_sum.add_rows`."""
        add_rows(self._version, self.sum_WKD, rows_Q, received_QKD, counts_G, replicas)
        self._touched.append(rows_Q)
        self._askers += sum(count > 0 for count in counts_G)

    def square_norms(self) -> Tensor:
        """Sum of squares of each block [K], fp64; nothing waits."""
        blocks, width = self.sum_WKD.shape[1:]
        if (rows_Q := self._few()) is None:
            _, squares_U = row_squares(self.sum_WKD.view(-1), 0, width)
            return sum_by_block(0, squares_U, blocks)
        if not rows_Q.numel():
            return torch.zeros(blocks, dtype=torch.float64, device=rows_Q.device)
        is_new_Q1 = None
        if self._askers > 1:  # several may have touched a row, which counts once
            rows_Q = rows_Q.sort().values
            is_new_Q1 = torch.ones_like(rows_Q, dtype=torch.bool)[:, None]
            is_new_Q1[1:, 0] = rows_Q[1:] != rows_Q[:-1]
        squares_QK = torch.linalg.vector_norm(self.sum_WKD[rows_Q], dim=2).double().square()
        return (squares_QK if is_new_Q1 is None else torch.where(is_new_Q1, squares_QK, 0.0)).sum(0)

    def scale_(self, factor: float) -> None:
        """Multiply."""
        if (rows_Q := self._few()) is None:
            self.sum_WKD.mul_(factor)
        else:
            self.sum_WKD[rows_Q] = self.sum_WKD[rows_Q] * factor  # the same for each mention of a row

    def clear(self) -> None:
        """Make it 0 again."""
        if (rows_Q := self._few()) is None:
            self.sum_WKD.zero_()
        else:
            self.sum_WKD.index_fill_(0, rows_Q, 0.0)
        self._touched, self._askers = [], 0

    def _few(self) -> Tensor | None:
        """The rows that may not be 0, some perhaps twice; None where going through all rows costs less."""
        if sum(rows_Q.numel() for rows_Q in self._touched) > len(self.sum_WKD) // 2:
            return None
        if len(self._touched) != 1:
            empty = torch.empty(0, dtype=torch.int64, device=self.sum_WKD.device)
            return torch.cat([empty, *self._touched])
        return self._touched[0]
