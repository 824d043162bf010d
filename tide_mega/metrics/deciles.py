"""Loss per frequency decile, and the routers' null weight per layer and decile.

Each accumulator lives on the device of `bin_of_type`; `update` never waits for that device. `reduce`
returns plain Python numbers, summed over data-parallel ranks; `reset` starts the next window.

Dimensions: B sequences, T tokens of a sequence, N = B * T, V vocabulary, L layers, S slots.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tide_mega.data.frequency import BIN_GROUPS
from tide_mega.metrics.slots import SLOTS, SlotIndex
from tide_mega.metrics.sums import AllReduce, SumAndCount

BySlot = dict[str, float | None]
"""A mean for each name in `SLOTS`, None where there was no token."""


@dataclass(frozen=True)
class DecileResult:
    """Mean cross entropy of target tokens in nats; None where there was no token."""

    loss: float | None
    """Over all tokens, those of no decile included."""
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
        """Return what records keep of it, by their fields' names."""
        names = ("loss", "rare", "mid", "common", "loss_by_bin", "count_by_bin")
        return {name: getattr(self, name) for name in names}


class DecileLoss(SumAndCount):
    """Cross entropy summed per frequency decile of the target token (SPEC section 3)."""

    def __init__(self, bin_of_type: Tensor) -> None:
        """Take the decile lookup `bin_of_type` [V] (see `SlotIndex`)."""
        super().__init__((len(SLOTS),), (len(SLOTS),), bin_of_type.device)
        self._index = SlotIndex(bin_of_type)

    @torch.no_grad()
    def update(self, loss_BT: Tensor, labels_BT: Tensor) -> None:
        """Add the cross entropy of each target id, in nats; negative labels are padding, left out.

        Deterministic on every device: a masked sum, no float atomics.

        Raises:
            ValueError: if the shapes differ.
        """
        _same_shape("loss_BT", loss_BT, "labels_BT", labels_BT)
        hot_NS = self._index.one_hot(labels_BT.reshape(-1))
        loss_N = loss_BT.reshape(-1).to(torch.float64)
        # `where`, not a product: a non-finite loss stays in its slot, and one under padding in none.
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
    """Mean router weight of the null bank, 0 to 1; every field is empty for a model without memory."""

    by_layer: list[float | None]
    """[L], over all tokens."""
    by_layer_and_bin: list[BySlot]
    """[L], by the slot of the input token."""
    mean_by_bin: BySlot
    """Mean over the layers."""
    last_by_bin: BySlot
    """The last layer (paper, Figure 10)."""


class NullWeight(SumAndCount):
    """Null weight of every router, summed per slot of the *input* token, whose rows it weighs."""

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
            ValueError: if the shapes do not belong together.
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
        # `where` as in DecileLoss, one slot at a time: [L, N, S] would be large.
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
