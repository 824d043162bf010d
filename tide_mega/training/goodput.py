"""Goodput: where the wall time of a run goes over all its restarts, by category.

Goodput is the productive share of the wall time. Every moment since the first start belongs to exactly one
category, so the categories add up to the wall time:

startup      from the start of the process to the first step, as far as no other category covers it
resume       reading a checkpoint
compute      steps that count: the productive time
data wait    waiting for the next step's batches
evaluation   held-out text
checkpoint   time that training waits for a save
skipped      steps whose update was not applied
lost         steps repeated after a restart or a rollback
other        logging, and everything else between steps
shutdown     closing logs and loaders
down         between the last update of one process and the start of the next
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tide_mega.files import parse_json, write_json

log = logging.getLogger(__name__)

CATEGORIES = (
    *("startup", "resume", "compute", "data wait", "evaluation", "checkpoint"),
    *("skipped", "lost", "other", "shutdown", "down"),
)
PRODUCTIVE = "compute"
TRAINING = ("compute", "data wait", "other")
"""Categories that count as training time when speed is measured."""


class Ledger:
    """The wall time of a run by category, kept in a file across restarts."""

    def __init__(
        self,
        path: Path | None = None,
        *,
        clock: Callable[[], float] = time.time,
        born: float | None = None,
        on_phase: Callable[[str], None] | None = None,
    ) -> None:
        """Open the run's ledger, or start a new one.

        Args:
            path: the file; None keeps the ledger in memory (ranks that do not write).
            clock: Unix time in seconds.
            born: when this process started; None asks the operating system.
            on_phase: called with the new category whenever it changes.
        """
        self._path, self._clock, self._on_phase = path, clock, on_phase
        now = clock()
        kept = _read(path)
        born = min(psutil.Process().create_time() if born is None else born, now)
        if kept:
            born = min(max(born, kept["updated"]), now)  # one process may train several runs in turn
        self.first_start: float = kept.get("first_start", born)
        """Unix time at which the run's first process started."""
        self.starts: int = kept.get("starts", 0) + 1
        """Starts of the run so far, this one included."""
        self._seconds: dict[str, float] = dict.fromkeys(CATEGORIES, 0.0) | kept.get("seconds", {})
        self._productive_at: dict[int, float] = {int(k): v for k, v in kept.get("productive_at", {}).items()}
        self._seconds["down"] += born - kept.get("updated", born)
        self._category, self._since = "startup", born
        self._elapsed = dict.fromkeys(CATEGORIES, 0.0)
        self._complained = False

    def enter(self, category: str) -> str:
        """Assign time from now on to `category`; return the previous category."""
        if category not in self._seconds:
            raise KeyError(f"{category!r} is no category of {', '.join(CATEGORIES)}")
        self._settle()
        before, self._category = self._category, category
        if self._on_phase is not None:
            self._on_phase(category)
        return before

    @contextmanager
    def spend(self, category: str) -> Iterator[None]:
        """Assign the time spent in the block to `category`, except for nested blocks."""
        before = self.enter(category)
        try:
            yield
        finally:
            self.enter(before)

    def training_seconds(self) -> float:
        """Return the seconds this process has spent training, without evaluation, checkpoints and the like."""
        self._settle()
        return sum(self._elapsed[category] for category in TRAINING)

    def productive(self) -> float:
        """Return the productive seconds so far."""
        self._settle()
        return self._seconds[PRODUCTIVE]

    def waste(self, since: float) -> None:
        """Move productive time since `productive()` returned `since` to "skipped": the step was not applied."""
        self._move(self.productive() - since, "skipped")

    def mark_saved(self, step: int) -> None:
        """Note that a checkpoint after `step` steps is being saved: productive time up to now cannot be lost."""
        self._productive_at[step] = self.productive()

    def go_back(self, step: int) -> None:
        """Move the productive time spent after `step` steps to "lost": the run continues from there."""
        self._productive_at = {s: seconds for s, seconds in self._productive_at.items() if s <= step}
        kept = self._productive_at.get(step)
        if kept is None:  # step 0, or a checkpoint unknown to this ledger: the known one before it is close
            kept = max(self._productive_at.values(), default=0.0)
        self._move(max(self.productive() - kept, 0.0), "lost")

    def seconds(self) -> dict[str, float]:
        """Return the seconds by category; they sum to `wall()`."""
        self._settle()
        return dict(self._seconds)

    def wall(self) -> float:
        """Return the seconds since the first start."""
        return sum(self.seconds().values())

    def goodput(self) -> float:
        """Return productive over wall time, 0 to 1."""
        wall = self.wall()
        return self._seconds[PRODUCTIVE] / wall if wall > 0 else 0.0

    def write(self) -> None:
        """Update the file atomically; a failing disk is logged once and not raised."""
        if self._path is None:
            return
        seconds = self.seconds()
        try:
            write_json(
                self._path,
                {
                    "first_start": self.first_start,
                    "starts": self.starts,
                    "updated": self._since,
                    "seconds": seconds,
                    "productive_at": self._productive_at,
                },
            )
        except OSError as error:
            if not self._complained:
                log.warning("%s could not be written: %s; said once, training goes on", self._path, error)
            self._complained = True

    def _move(self, seconds: float, to: str) -> None:
        self._seconds[PRODUCTIVE] -= seconds
        self._seconds[to] += seconds

    def _settle(self) -> None:
        now = self._clock()
        passed = max(now - self._since, 0.0)  # the clock may have been set back
        self._seconds[self._category] += passed
        self._elapsed[self._category] += passed
        self._since = now


def _read(path: Path | None) -> dict[str, Any]:
    """Return what an earlier process wrote; empty if there is no file or it cannot be read."""
    if path is None or not path.exists():
        return {}
    try:
        kept = parse_json(path.read_text(encoding="utf-8"))
        return kept if {"first_start", "starts", "updated", "seconds"} <= kept.keys() else {}
    except (OSError, ValueError, AttributeError) as error:
        log.warning("%s cannot be read (%s): goodput is counted from this start", path, error)
        return {}
