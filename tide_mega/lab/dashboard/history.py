"""What one run logged, by W&B name, as it stands after resumes and rollbacks."""

from collections.abc import Iterable
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


def standing(rows: Iterable[Row]) -> tuple[list[Row], int]:
    """Drop rows superseded by a resume or rollback; return the remaining rows and the number dropped.

    As in metrics.jsonl: a row logged before, or of an earlier step, removes everything logged since; of events
    it removes those with more tokens, and the same one.
    """
    kept: list[Row] = []
    dropped = 0
    for row in rows:
        tail = _tail(kept, row)
        again = next((n for n in tail if not _is_event(kept[n]) and not _precedes(kept[n], row)), len(kept))
        gone = {n for n in tail if not _precedes(kept[n], row) or (n >= again and not _is_event(kept[n]))}
        if gone:
            kept[tail.start :] = [kept[n] for n in tail if n not in gone]
        dropped += len(gone)
        kept.append(row)
    return kept, dropped


def _tail(kept: list[Row], row: Row) -> range:
    """Return the index from which rows may follow `row`: since steps and tokens were both behind it."""
    for n in reversed(range(len(kept))):
        earlier = kept[n]
        if earlier["step"] < row["step"] and earlier["tokens"] < row["tokens"] and not _is_event(earlier):
            return range(n + 1, len(kept))
    return range(len(kept))


def _precedes(earlier: Row, row: Row) -> bool:
    if _is_event(earlier):
        comes_again = earlier["tokens"] == row["tokens"] and earlier.keys() == row.keys()
        return earlier["tokens"] <= row["tokens"] and not comes_again
    if earlier["step"] == row["step"]:
        return _is_event(row) or not (earlier.keys() & row.keys()) - set(AXES)
    return earlier["step"] < row["step"]


def _is_event(row: Row) -> bool:
    return any(name.startswith("events/") for name in row)
