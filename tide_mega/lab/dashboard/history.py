"""What one run logged, by W&B name."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tide_mega.lab.dashboard.panel import AXES

Row = dict[str, float]
"""A logged record: `step`, `tokens` and metrics."""


@dataclass(frozen=True)
class Series:
    """One metric of a run; arrays of the same length, in the order logged."""

    step: NDArray[np.int64]
    tokens: NDArray[np.int64]
    value: NDArray[np.float64]


@dataclass(frozen=True)
class RunHistory:
    """A run as read."""

    label: str
    source: str
    """The file or folder it was read from."""
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    """What is missing from `rows` and why, and what was damaged."""

    def names(self) -> list[str]:
        """Return the metrics, sorted."""
        return sorted(self._rows_with)

    def series(self, name: str) -> Series:
        """Return one metric; empty if the run has none of it."""
        rows = self._rows_with.get(name, [])
        return Series(
            np.array([row["step"] for row in rows], np.int64),
            np.array([row["tokens"] for row in rows], np.int64),
            np.array([row[name] for row in rows], np.float64),
        )

    @cached_property
    def _rows_with(self) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            for name in row:
                if name not in AXES:
                    found.setdefault(name, []).append(row)
        return found

    @property
    def has_memory(self) -> bool:
        """Whether the model has routers, so null weights."""
        return any(name.startswith("null_weight") for name in self.names())
