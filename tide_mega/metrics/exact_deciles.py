"""Loss per decile whose sums are the same bits in any order: over steps, ranks, and any stop in between.

Shapes: B sequences, T tokens, N = B * T, V vocabulary, S slots.
"""

import torch
from torch import Tensor

from tide_mega.metrics.deciles import DecileLoss
from tide_mega.metrics.slots import SLOTS, SlotIndex

GRAIN = 2.0**22
"""Losses are taken in multiples of 1 / GRAIN nats, finer than fp32 has them from 2 nats on. fp64 adds these
without rounding up to 2^31 nats in a slot, so that the order does not matter, nor do a GPU's atomics."""


class ExactDecileLoss(DecileLoss):
    """As `DecileLoss`, for the many tokens of training: cheaper, and exact where that one is accurate."""

    def __init__(self, bin_of_type: Tensor) -> None:
        """Take the decile lookup [V] (see `SlotIndex`)."""
        super().__init__(bin_of_type)
        self._slots = SlotIndex(bin_of_type)
        self._one = torch.ones(1, dtype=torch.int64, device=bin_of_type.device)

    @torch.no_grad()
    def update(self, loss_BT: Tensor, labels_BT: Tensor) -> None:
        """Add the cross entropy of each target id, in nats and finite; negative labels are left out.

        Raises:
            ValueError: if the shapes differ.
        """
        if loss_BT.shape != labels_BT.shape:
            raise ValueError(
                f"loss_BT has shape {tuple(loss_BT.shape)} but labels_BT has {tuple(labels_BT.shape)}"
            )
        slot_N = self._slots.slots(labels_BT.reshape(-1))
        grains_N = (loss_BT.reshape(-1).double() * GRAIN).round_().div_(GRAIN)
        for total_S, values_N in ((self.sum, grains_N), (self.count, self._one.expand_as(slot_N))):
            with_padding = total_S.new_zeros(len(SLOTS) + 1).index_add_(0, slot_N, values_N)
            total_S += with_padding[:-1]
