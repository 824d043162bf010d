"""The tokens of a micro-batch sorted by memory row, which makes reads coalesce and row gradients deterministic.

Dimensions: N tokens, U rows read.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenOrder:
    """The row each token reads, and the tokens that read each row; all int32, shapes known without a host sync."""

    index_N: Tensor
    """Row of each token."""
    sorted_N: Tensor
    """Tokens by ascending row; those of one row in their own order."""
    starts_U1: Tensor
    """Tokens of row u are `sorted_N[starts_U1[u] : starts_U1[u + 1]]`; none if the micro-batch lacks it."""

    @staticmethod
    def sort(index_N: Tensor, num_rows: int) -> "TokenOrder":
        """Sort the tokens once per micro-batch; every layer uses the result."""
        ascending_N, sorted_N = torch.sort(index_N, stable=True)
        rows_U1 = torch.arange(num_rows + 1, device=index_N.device, dtype=index_N.dtype)
        starts_U1 = torch.searchsorted(ascending_N, rows_U1)
        return TokenOrder(index_N.int(), sorted_N.int(), starts_U1.int())

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.index_N.numel()

    @property
    def num_rows(self) -> int:
        """U."""
        return self.starts_U1.numel() - 1

    @property
    def key(self) -> int:
        """A key that is the same for every layer of a micro-batch, as long as the order lives."""
        return self.index_N.data_ptr()

    def pack(self) -> Tensor:
        """Pack into one tensor, since megatron carries only one to the layers."""
        return torch.cat((self.index_N, self.sorted_N, self.starts_U1))

    @staticmethod
    def unpack(packed: Tensor, num_tokens: int) -> "TokenOrder":
        """Return the order as views of a packed tensor."""
        return TokenOrder(*packed.split((num_tokens, num_tokens, packed.numel() - 2 * num_tokens)))
