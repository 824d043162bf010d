"""Equation 2.2 of the paper: E[N_v] = tau (1 - (1 - f_v)^(B T)).

Over tau steps of B sequences of T tokens, f_v being the token's share of the text. Shapes: V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tide_mega.diagnostics.type_groups import by_slot

FEW = (1, 10, 100)
"""Types with fewer expected updates than these are counted."""


@dataclass(frozen=True)
class Schedule:
    """Optimizer steps and what each reads."""

    steps: float
    """tau."""
    tokens_per_step: int
    """B T."""


@dataclass(frozen=True)
class SlotUpdates:
    """Expected updates of the types of a slot; None where it has no type."""

    types: int
    least: float | None
    median: float | None
    greatest: float | None
    few: tuple[int, ...]
    """Types below each of `FEW`."""


def expected_updates(f: ArrayLike, schedule: Schedule) -> NDArray[np.float64]:
    """Evaluate the equation for shares `f`, to full precision for the smallest too.

    Raises:
        ValueError: a share is not between 0 and 1.
    """
    share = np.asarray(f, np.float64)
    outside = ~((share >= 0) & (share <= 1))
    if outside.any():
        raise ValueError(f"a token's share of the text lies between 0 and 1, not at {share[outside].flat[0]}")
    with np.errstate(divide="ignore"):  # log 0 at f = 1
        return -schedule.steps * np.expm1(schedule.tokens_per_step * np.log1p(-share))


def measure_updates(
    counts_V: NDArray[np.integer], bins_V: NDArray[np.integer], schedule: Schedule
) -> dict[str, SlotUpdates]:
    """Summarise the expected updates of the types of every slot.

    Raises:
        ValueError: all counts are 0.
    """
    total = int(counts_V.sum())
    if total == 0:
        raise ValueError("the training text has no token: all counts are 0")
    updates_V = expected_updates(counts_V / total, schedule)
    return {slot: _summary(updates_V[ids]) for slot, ids in by_slot(bins_V).items()}


def _summary(updates: NDArray[np.float64]) -> SlotUpdates:
    few = tuple(int((updates < n).sum()) for n in FEW)
    if not len(updates):
        return SlotUpdates(0, None, None, None, few)
    least, median, greatest = (float(of(updates)) for of in (np.min, np.median, np.max))
    return SlotUpdates(len(updates), least, median, greatest, few)
