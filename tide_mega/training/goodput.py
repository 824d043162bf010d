"""Where the wall time of a run goes, over all its restarts: goodput is the productive part of it.

Every moment since the first start belongs to exactly one category, so the categories add up to the wall time:

startup      from the birth of the process to the first step, and what is left of building
resume       reading a checkpoint
compute      steps that count: the productive time
data wait    waiting for the next step's batches
evaluation   held-out text
checkpoint   what training waits for a save
skipped      steps whose update was not applied
lost         steps done again after a restart or a rollback
other        logging, and what is left between steps
shutdown     closing logs and loaders
down         between the last sign of one process and the birth of the next
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tide_mega.config.stored import parse_json
from tide_mega.data.atomic import write_json

log = logging.getLogger(__name__)

CATEGORIES = (
    *("startup", "resume", "compute", "data wait", "evaluation", "checkpoint"),
    *("skipped", "lost", "other", "shutdown", "down"),
)
PRODUCTIVE = "compute"
TRAINING = ("compute", "data wait", "other")
"""What the speed of training is measured over."""


class Ledger:
    """The wall time of a run by category, kept in a file from start to start."""

    def __init__(
        self,
        path: Path | None = None,
        *,
        clock: Callable[[], float] = time.time,
        born: float | None = None,
        on_phase: Callable[[str], None] | None = None,
    ) -> None:
        """Open the run's ledger, or begin one.

        Args:
            path: the file; None keeps the account in this process alone (ranks that do not write).
            clock: Unix time in seconds.
            born: when this process began; None asks the operating system.
            on_phase: told the category whenever it changes.
        """
        self._path, self._clock, self._on_phase = path, clock, on_phase
        now = clock()
        kept = _read(path)
        born = min(psutil.Process().create_time() if born is None else born, now)
        if kept:
            born = min(max(born, kept["updated"]), now)  # a process may train one run after another
        self.first_start: float = kept.get("first_start", born)
        """Unix time at which the run's first process began."""
        self.starts: int = kept.get("starts", 0) + 1
        """Processes that have worked on the run so far, this one included."""
        self._seconds: dict[str, float] = dict.fromkeys(CATEGORIES, 0.0) | kept.get("seconds", {})
        self._productive_at: dict[int, float] = {int(k): v for k, v in kept.get("productive_at", {}).items()}
        self._seconds["down"] += born - kept.get("updated", born)
        self._category, self._since = "startup", born
        self._elapsed = dict.fromkeys(CATEGORIES, 0.0)
        self._complained = False

    def enter(self, category: str) -> str:
        """From now on time belongs to `category`; return the one before."""
        if category not in self._seconds:
            raise KeyError(f"{category!r} is no category of {', '.join(CATEGORIES)}")
        self._settle()
        before, self._category = self._category, category
        if self._on_phase is not None:
            self._on_phase(category)
        return before

    @contextmanager
    def spend(self, category: str) -> Iterator[None]:
        """Time in the block belongs to `category`, but for blocks within it."""
        before = self.enter(category)
        try:
            yield
        finally:
            self.enter(before)

    def training_seconds(self) -> float:
        """A clock that runs while this process trains, and stands in evaluation, checkpoints and the like."""
        self._settle()
        return sum(self._elapsed[category] for category in TRAINING)

    def productive(self) -> float:
        """Productive seconds so far."""
        self._settle()
        return self._seconds[PRODUCTIVE]

    def waste(self, since: float) -> None:
        """The productive time since `productive()` gave `since` went into a step that was not applied."""
        self._move(self.productive() - since, "skipped")

    def mark_saved(self, step: int) -> None:
        """A checkpoint of `step` steps is being made: what was productive until now is kept."""
        self._productive_at[step] = self.productive()

    def go_back(self, step: int) -> None:
        """The run continues from `step` steps: what was productive since then is lost."""
        self._productive_at = {s: seconds for s, seconds in self._productive_at.items() if s <= step}
        kept = self._productive_at.get(step)
        if kept is None:  # step 0, or a checkpoint that this ledger does not know: the one before it is near
            kept = max(self._productive_at.values(), default=0.0)
        self._move(max(self.productive() - kept, 0.0), "lost")

    def seconds(self) -> dict[str, float]:
        """Seconds by category; their sum is `wall()`."""
        self._settle()
        return dict(self._seconds)

    def wall(self) -> float:
        """Seconds since the first start."""
        return sum(self.seconds().values())

    def goodput(self) -> float:
        """Productive over wall time, 0 to 1."""
        wall = self.wall()
        return self._seconds[PRODUCTIVE] / wall if wall > 0 else 0.0

    def write(self) -> None:
        """Bring the file up to date, atomically; a disk that refuses is logged once."""
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
        passed = max(now - self._since, 0.0)  # a clock that was set back
        self._seconds[self._category] += passed
        self._elapsed[self._category] += passed
        self._since = now


def _read(path: Path | None) -> dict[str, Any]:
    """Return what an earlier process wrote; empty where there is nothing, or nothing legible."""
    if path is None or not path.exists():
        return {}
    try:
        kept = parse_json(path.read_text(encoding="utf-8"))
        return kept if {"first_start", "starts", "updated", "seconds"} <= kept.keys() else {}
    except (OSError, ValueError, AttributeError) as error:
        log.warning("%s cannot be read (%s): goodput is counted from this start", path, error)
        return {}
