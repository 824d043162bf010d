"""The twelve slots a token falls into: ten frequency deciles, and the two kinds that belong to none.

Dimensions: N tokens, V vocabulary, S slots.
"""

import torch
from torch import Tensor

from tide_mega.data.frequency import DROPPED, NUM_BINS, UNSEEN

SLOTS = (*(str(b) for b in range(NUM_BINS)), "dropped", "unseen")
"""Names: deciles from rarest to commonest; dropped (special, blank, punctuation); unseen in training."""


class SlotIndex:
    """Finds the slot of token ids; lives on the device of the lookup it is given."""

    def __init__(self, bin_of_type: Tensor) -> None:
        """Take `bin_of_type` [V]: 0..9, `DROPPED` or `UNSEEN`; anything else raises ValueError."""
        allowed = torch.tensor([*range(NUM_BINS), DROPPED, UNSEEN], device=bin_of_type.device)
        wrong_V = ~torch.isin(bin_of_type.to(torch.int64), allowed)
        if wrong_V.any():
            token = int(wrong_V.nonzero()[0])
            raise ValueError(
                f"bin_of_type[{token}] is {int(bin_of_type[token])}; it must be a decile 0..{NUM_BINS - 1}, "
                f"{DROPPED} (dropped) or {UNSEEN} (unseen)"
            )
        slot_V = bin_of_type.to(torch.int64)
        slot_V = torch.where(bin_of_type == DROPPED, SLOTS.index("dropped"), slot_V)
        self._slot_V = torch.where(bin_of_type == UNSEEN, SLOTS.index("unseen"), slot_V)
        self._slots_S = torch.arange(len(SLOTS), device=bin_of_type.device)

    def one_hot(self, tokens_N: Tensor) -> Tensor:
        """Bool [N, S] of ids [N] below V; the row of a negative id (padding) is all false."""
        slot_N = self._slot_V[tokens_N.clamp(min=0)]
        return (slot_N[:, None] == self._slots_S) & (tokens_N >= 0)[:, None]

    def slots(self, tokens_N: Tensor) -> Tensor:
        """Slot [N] of ids [N] below V, int64; S for a negative id (padding)."""
        return torch.where(tokens_N >= 0, self._slot_V[tokens_N.clamp(min=0)], len(SLOTS))
