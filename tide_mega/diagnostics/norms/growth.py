"""Embedding norms by frequency: means per decile, their order, and how they grow from checkpoint to checkpoint.

Shapes: V vocabulary, K blocks, C checkpoints, F frequency deciles.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tide_mega.data.frequency import NUM_BINS
from tide_mega.diagnostics.type_groups import by_slot


@dataclass(frozen=True)
class SlotNorms:
    """l2 norms of the types of a slot; None where it has no type."""

    types: int
    mean: float | None
    std: float | None
    """Over the types."""


def measure_norms(norms_V: NDArray[np.floating], bins_V: NDArray[np.integer]) -> dict[str, SlotNorms]:
    """Summarise the norms of every slot's types."""
    found = {}
    for slot, ids in by_slot(bins_V).items():
        norms = norms_V[ids].astype(np.float64)
        mean, std = (float(norms.mean()), float(norms.std())) if len(ids) else (None, None)
        found[slot] = SlotNorms(len(ids), mean, std)
    return found


def decile_means(norms_V: NDArray[np.floating], bins_V: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return the mean norm of each decile [F], or of [V, K] norms [F, K]; NaN for a decile without a type."""
    means = np.full((NUM_BINS, *norms_V.shape[1:]), np.nan)
    for b in range(NUM_BINS):
        if (bins_V == b).any():
            means[b] = norms_V[bins_V == b].astype(np.float64).mean(0)
    return means


@dataclass(frozen=True)
class Order:
    """How values go from the rarest decile to the commonest."""

    rises: int
    falls: int
    steps: int
    """Neighbouring pairs."""
    spearman: float | None
    """Rank correlation with the decile; None where there are not two different values."""

    @property
    def verb(self) -> str:
        """Say it in words."""
        if self.steps and self.steps in (self.rises, self.falls):
            return "rises monotonically" if self.rises else "falls monotonically"
        return "neither rises nor falls monotonically"

    def __str__(self) -> str:
        correlation = "" if self.spearman is None else f", Spearman {self.spearman:+.2f}"
        return f"{self.rises} of {self.steps} steps rise{correlation}"


def measure_order(values_F: NDArray[np.floating]) -> Order:
    """Say whether values, NaN left out, rise along their index."""
    known = values_F[np.isfinite(values_F)]
    steps = np.diff(known)
    _, place, times = np.unique(known, return_inverse=True, return_counts=True)
    rank = (np.cumsum(times) - (times - 1) / 2)[place]  # the mean rank of equal values
    spearman = float(np.corrcoef(rank, np.arange(len(known)))[0, 1]) if len(times) > 1 else None
    return Order(int((steps > 0).sum()), int((steps < 0).sum()), len(steps), spearman)


@dataclass(frozen=True)
class Growth:
    """Mean norms at consecutive checkpoints, and their change per so many training tokens."""

    tokens_C: tuple[int, ...]
    """Training tokens at each checkpoint, ascending."""
    mean_CF: NDArray[np.float64]

    def __post_init__(self) -> None:
        if any(later <= earlier for earlier, later in pairwise(self.tokens_C)):
            raise ValueError(f"checkpoints must ascend in training tokens, not {list(self.tokens_C)}")

    @property
    def intervals(self) -> int:
        """Pairs of consecutive checkpoints."""
        return max(0, len(self.tokens_C) - 1)

    @property
    def unit(self) -> int:
        """Tokens that `rate_CF` is per."""
        return 10**9 if self.tokens_C[-1] >= 10**9 else 10**6

    @property
    def unit_name(self) -> str:
        """`unit` in words."""
        return "billion" if self.unit == 10**9 else "million"

    @property
    def rate_CF(self) -> NDArray[np.float64]:
        """Change of each decile's mean norm per `unit` tokens [C - 1, F]."""
        passed_C = np.diff(np.asarray(self.tokens_C, np.float64))
        return np.diff(self.mean_CF, axis=0) / passed_C[:, None] * self.unit

    def thinned(self, intervals: int) -> "Growth":
        """Leave checkpoints out, evenly, until there are so many intervals at most."""
        if self.intervals <= intervals:
            return self
        kept = np.linspace(0, self.intervals, intervals + 1).round().astype(int)
        return Growth(tuple(self.tokens_C[i] for i in kept), self.mean_CF[kept])
