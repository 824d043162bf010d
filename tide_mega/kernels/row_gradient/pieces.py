"""Rows cut into pieces of at most C tokens, so that a frequent row is summed by many programs instead of one.

Computed on the device with shapes known to the host, so nothing waits for a count.

Dimensions: N tokens, U rows, P pieces at most, M long rows at most (rows of several pieces).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tide_mega.kernels.token_order import TokenOrder


@dataclass(frozen=True)
class Pieces:
    """Where the tokens of each piece are, and where the sums of long rows are kept; all int32."""

    tokens: int
    """C, the maximum tokens of a piece."""
    row_P: Tensor
    """Row of each piece, ascending; U for unused pieces."""
    first_U: Tensor
    """First piece of each row: piece p holds its row's tokens from `(p - first_U[row]) * tokens` on."""
    slot_U: Tensor
    """Slot of a long row's first piece, followed by its others; -1 for a row of one piece or none."""
    long_M: Tensor
    """The long rows, ascending; U for unused entries."""
    num_slots: int
    """Number of slots that suffices for any ids."""

    @staticmethod
    def cut(order: TokenOrder, tokens: int) -> "Pieces":
        """Cut the rows of `order` into pieces of at most `tokens` tokens."""
        device, N, U = order.starts_U1.device, order.num_tokens, order.num_rows
        pieces_U = (order.starts_U1.diff() + (tokens - 1)) // tokens
        ends_U = pieces_U.cumsum(0)
        long_U = pieces_U > 1
        slots_U = pieces_U * long_U
        slot_U = (slots_U.cumsum(0) - slots_U).masked_fill(~long_U, -1)
        most_pieces = min(U, N) + N // tokens
        most_long = N // (tokens + 1)
        row_P = torch.searchsorted(
            ends_U, torch.arange(most_pieces, device=device), right=True, out_int32=True
        )
        long_M = torch.searchsorted(
            long_U.cumsum(0), torch.arange(1, most_long + 1, device=device), out_int32=True
        )
        # A row of c > C tokens has fewer than c / C + 1 pieces, which is at most 2 c / C.
        num_slots = 2 * N // tokens if most_long else 0
        return Pieces(tokens, row_P, (ends_U - pieces_U).int(), slot_U.int(), long_M, num_slots)
