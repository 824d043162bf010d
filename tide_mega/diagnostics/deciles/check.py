"""Whether an evaluation adds up: losses of the parts to the loss of the whole, tokens to the held-out text.

Shapes: V vocabulary.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from tide_mega.data.batch import TokenBatch
from tide_mega.data.frequency import DROPPED
from tide_mega.diagnostics.deciles.rows import ROLES
from tide_mega.diagnostics.deciles.run_losses import DECILES, OUTSIDE, DecileRun

UNIT_ROUNDOFF = Fraction(1, 2**53)
"""Of float64."""


@dataclass(frozen=True)
class SumCheck:
    """A recorded mean loss against that of its parts; nats per token."""

    what: str
    """all, rare, mid or common."""
    tokens: int
    recorded: float
    difference: float
    """Sum over the parts of loss x count, over the count, minus what was recorded; computed without rounding."""
    bound: float
    """The most that rounding can make of it."""

    @property
    def in_last_places(self) -> float:
        """The difference in units of the recorded loss's last binary place."""
        return self.difference / math.ulp(self.recorded)

    @property
    def holds(self) -> bool:
        """Whether the two are equal but for the rounding of the recorded numbers themselves."""
        return abs(self.difference) <= self.bound


def check_sums(run: DecileRun) -> list[SumCheck]:
    """Compare each recorded mean with its slots: of all tokens, and of rare, mid and common ones.

    Every recorded mean is sum / count of float64 sums that are added in float64. So with n parts the weighted
    mean of the parts, taken in rational numbers, differs from the recorded one by at most (n + 1) roundings,
    and not at all where the means are float64 numbers themselves. Means that are absent or not finite are left
    out.
    """
    parts = {"all": DECILES + OUTSIDE, **ROLES}
    recorded = {"all": run.loss, "rare": run.rare, "mid": run.mid, "common": run.common}
    checks = []
    for what, slots in parts.items():
        mean = recorded[what]
        used = [slot for slot in slots if run.count_by_slot[slot]]
        losses = [run.loss_by_slot[slot] for slot in used]
        if mean is None or not math.isfinite(mean):
            continue
        finite = [loss for loss in losses if loss is not None and math.isfinite(loss)]
        if len(finite) < len(used):
            continue
        tokens = sum(run.count_by_slot[slot] for slot in used)
        total = sum(
            (Fraction(loss) * run.count_by_slot[slot] for loss, slot in zip(finite, used, strict=True)),
            Fraction(0),
        )
        exact = total / tokens
        bound = (len(used) + 1) * UNIT_ROUNDOFF * abs(exact)
        checks.append(SumCheck(what, tokens, mean, float(exact - Fraction(mean)), float(bound)))
    return checks


def count_slots(batches: Iterable[TokenBatch], bin_of_type: np.ndarray) -> dict[str, int]:
    """Count the labels of batches by slot; `bin_of_type` is [V]. Negative labels are padding."""
    counts = dict.fromkeys(DECILES + OUTSIDE, 0)
    for batch in batches:
        labels = batch.labels_BT.numpy().ravel()
        bins, found = np.unique(bin_of_type[labels[labels >= 0]], return_counts=True)
        for of_bin, number in zip(bins.tolist(), found.tolist(), strict=True):
            counts[_slot(of_bin)] += number
    return counts


def differing(recorded: Mapping[str, int], counted: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Return, for the slots whose numbers differ, (recorded, counted)."""
    return {slot: (recorded[slot], counted[slot]) for slot in counted if recorded[slot] != counted[slot]}


def _slot(of_bin: int) -> str:
    if of_bin >= 0:
        return str(of_bin)
    return "dropped" if of_bin == DROPPED else "unseen"
