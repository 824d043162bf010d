"""Sums by frequency decile: losses, and the null-bank weight of the routers by layer and decile of the token.

A token falls into one of twelve slots: the ten frequency deciles, and two kinds that belong to none. Each
accumulator lives on the device of `bin_of_type`, and `update` never waits for that device. `reduce` returns
plain Python numbers summed over data-parallel ranks; `reset` starts the next window.

`ExactDecileLoss` sums so that the result has the same bits in any order of addition: over steps, ranks, and any
stop in between.

Dimensions: B sequences, T tokens of a sequence, N = B * T tokens, V vocabulary, L layers, S slots.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tide_mega.data.frequency import BIN_GROUPS, DROPPED, NUM_BINS, UNSEEN

SLOTS = (*(str(b) for b in range(NUM_BINS)), "dropped", "unseen")
"""Slot names: deciles from rarest to most common; dropped (special, blank, punctuation); unseen in training."""


class SlotIndex:
    """Maps token ids to slots; lives on the device of its lookup table."""

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
        """Return bool [N, S] for ids [N] below V; the row of a negative id (padding) is all false."""
        slot_N = self._slot_V[tokens_N.clamp(min=0)]
        return (slot_N[:, None] == self._slots_S) & (tokens_N >= 0)[:, None]

    def slots(self, tokens_N: Tensor) -> Tensor:
        """Return the slots [N] of ids [N] below V, int64; S for a negative id (padding)."""
        return torch.where(tokens_N >= 0, self._slot_V[tokens_N.clamp(min=0)], len(SLOTS))


AllReduce = Callable[[Tensor], object]
"""Sums a tensor in place over the data-parallel ranks; its return value is ignored."""


class SumAndCount:
    """A float64 sum and an int64 count on one device, updated without waiting for it."""

    def __init__(
        self, sum_shape: tuple[int, ...], count_shape: tuple[int, ...], device: torch.device
    ) -> None:
        self.sum = torch.zeros(sum_shape, dtype=torch.float64, device=device)
        self.count = torch.zeros(count_shape, dtype=torch.int64, device=device)

    def reset(self) -> None:
        """Reset to zero."""
        self.sum.zero_()
        self.count.zero_()

    def reduced(self, all_reduce: AllReduce) -> tuple[Tensor, Tensor]:
        """Return sum and count over all ranks, on the CPU; the local values are unchanged."""
        total, count = self.sum.clone(), self.count.clone()
        all_reduce(total)
        all_reduce(count)
        return total.cpu(), count.cpu()


BySlot = dict[str, float | None]
"""A mean for each name in `SLOTS`; None if there was no token."""


@dataclass(frozen=True)
class DecileResult:
    """Mean cross entropy of target tokens in nats; None if there was no token."""

    loss: float | None
    """Over all tokens, including those of no decile."""
    tokens: int
    loss_by_bin: BySlot
    count_by_bin: dict[str, int]
    rare: float | None
    """Mean over the tokens of bins 0-2."""
    mid: float | None
    """Mean over the tokens of bins 3-6."""
    common: float | None
    """Mean over the tokens of bins 7-9."""

    def means(self) -> dict[str, Any]:
        """Return the fields that records keep, by name."""
        names = ("loss", "rare", "mid", "common", "loss_by_bin", "count_by_bin")
        return {name: getattr(self, name) for name in names}


class DecileLoss(SumAndCount):
    """Cross entropy summed per frequency decile of the target token (paper, appendix B)."""

    def __init__(self, bin_of_type: Tensor) -> None:
        """Take the decile lookup `bin_of_type` [V] (see `SlotIndex`)."""
        super().__init__((len(SLOTS),), (len(SLOTS),), bin_of_type.device)
        self._index = SlotIndex(bin_of_type)

    @torch.no_grad()
    def update(self, loss_BT: Tensor, labels_BT: Tensor) -> None:
        """Add the cross entropy of each target id, in nats; negative labels are padding and left out.

        Deterministic on every device: a masked sum, no float atomics.

        Raises:
            ValueError: the shapes differ.
        """
        _same_shape("loss_BT", loss_BT, "labels_BT", labels_BT)
        hot_NS = self._index.one_hot(labels_BT.reshape(-1))
        loss_N = loss_BT.reshape(-1).to(torch.float64)
        # `where` and not a product, so that a non-finite loss affects its own slot only, and none under padding.
        self.sum += torch.where(hot_NS, loss_N[:, None], 0.0).sum(0)
        self.count += hot_NS.sum(0)

    def reduce(self, all_reduce: AllReduce) -> DecileResult:
        """Means over the tokens of all ranks; a collective: every rank calls it and has the result."""
        sum_S, count_S = self.reduced(all_reduce)
        return DecileResult(
            loss=_mean(sum_S, count_S, range(len(SLOTS))),
            tokens=int(count_S.sum()),
            loss_by_bin=_mean_by_slot(sum_S, count_S),
            count_by_bin=dict(zip(SLOTS, count_S.tolist(), strict=True)),
            rare=_mean(sum_S, count_S, BIN_GROUPS["rare"]),
            mid=_mean(sum_S, count_S, BIN_GROUPS["mid"]),
            common=_mean(sum_S, count_S, BIN_GROUPS["common"]),
        )


@dataclass(frozen=True)
class NullWeightResult:
    """Mean router weight of the null bank, 0 to 1; all fields are empty for a model without memory."""

    by_layer: list[float | None]
    """[L], over all tokens."""
    by_layer_and_bin: list[BySlot]
    """[L], each by the slot of the input token."""
    mean_by_bin: BySlot
    """Mean over the layers."""
    last_by_bin: BySlot
    """The last layer (paper, Figure 10)."""


class NullWeight(SumAndCount):
    """Null-bank weight of every router, summed by slot of the *input* token, whose rows it weights."""

    def __init__(self, num_layers: int, bin_of_type: Tensor) -> None:
        """Take L (0 for a model without memory) and the decile lookup [V] (see `SlotIndex`)."""
        super().__init__((num_layers, len(SLOTS)), (len(SLOTS),), bin_of_type.device)
        self._num_layers = num_layers
        self._index = SlotIndex(bin_of_type)

    @torch.no_grad()
    def update(self, null_LBT: Tensor | None, tokens_BT: Tensor, labels_BT: Tensor | None = None) -> None:
        """Add null weights of the input ids; positions with a negative id or label are left out.

        Does nothing for a model without memory, where `null_LBT` is None.

        Raises:
            ValueError: the shapes do not match.
        """
        if self._num_layers == 0:
            return
        expected = (self._num_layers, *tokens_BT.shape)
        if null_LBT is None or null_LBT.shape != expected:
            shape = None if null_LBT is None else tuple(null_LBT.shape)
            raise ValueError(f"null_LBT has shape {shape}; layers and tokens make {expected}")
        tokens_N = tokens_BT.reshape(-1)
        if labels_BT is not None:
            _same_shape("labels_BT", labels_BT, "tokens_BT", tokens_BT)
            tokens_N = torch.where(labels_BT.reshape(-1) >= 0, tokens_N, -1)
        null_LN = null_LBT.reshape(self._num_layers, -1).to(torch.float64)
        hot_NS = self._index.one_hot(tokens_N)
        # `where` as in DecileLoss, but one slot at a time: [L, N, S] would be large.
        self.sum += torch.stack([torch.where(hot_N, null_LN, 0.0).sum(1) for hot_N in hot_NS.T], dim=1)
        self.count += hot_NS.sum(0)

    def reduce(self, all_reduce: AllReduce) -> NullWeightResult:
        """Means over the tokens of all ranks; a collective: every rank calls it and has the result."""
        if self._num_layers == 0:
            return NullWeightResult([], [], {}, {})
        sum_LS, count_S = self.reduced(all_reduce)
        by_layer_and_bin = [_mean_by_slot(sum_S, count_S) for sum_S in sum_LS]
        return NullWeightResult(
            by_layer=[_mean(sum_S, count_S, range(len(SLOTS))) for sum_S in sum_LS],
            by_layer_and_bin=by_layer_and_bin,
            mean_by_bin=_mean_by_slot(sum_LS.mean(0), count_S),
            last_by_bin=by_layer_and_bin[-1],
        )


def _mean(sum_S: Tensor, count_S: Tensor, slots: Iterable[int]) -> float | None:
    chosen = list(slots)
    count = int(count_S[chosen].sum())
    return sum_S[chosen].sum().item() / count if count else None


def _mean_by_slot(sum_S: Tensor, count_S: Tensor) -> BySlot:
    return {name: _mean(sum_S, count_S, [i]) for i, name in enumerate(SLOTS)}


def _same_shape(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"{name_a} has shape {tuple(a.shape)} but {name_b} has {tuple(b.shape)}")


GRAIN = 2.0**22
"""Losses are rounded to multiples of 1 / GRAIN nats, finer than fp32 from 2 nats on. fp64 adds these without
rounding up to 2^31 nats in a slot, so neither the order of addition nor a GPU's atomics matter."""


class ExactDecileLoss(DecileLoss):
    """Like `DecileLoss`, for the many tokens of training: cheaper, and exact where that one is only accurate."""

    def __init__(self, bin_of_type: Tensor) -> None:
        """Take the decile lookup [V] (see `SlotIndex`)."""
        super().__init__(bin_of_type)
        self._slots = SlotIndex(bin_of_type)
        self._one = torch.ones(1, dtype=torch.int64, device=bin_of_type.device)

    @torch.no_grad()
    def update(self, loss_BT: Tensor, labels_BT: Tensor) -> None:
        """Add the cross entropy of each target id, in nats and finite; negative labels are left out.

        Raises:
            ValueError: the shapes differ.
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
