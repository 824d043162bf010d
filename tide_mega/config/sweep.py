"""What becomes of a sweep's points: one that fails keeps no other from running, and all are accounted for.

Points that run in the process which started the sweep are kept in memory. Those that run as jobs of a cluster
leave a file each in a folder of `hydra.sweep.dir`, which is removed when the sweep has been summed up.
"""

import json
import os
import shutil
import sys
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

from tide_mega.config.exits import Exit
from tide_mega.config.stored import parse_json
from tide_mega.config.urls import without_credentials

_ALIKE_ON_EVERY_RANK = (Exit.DONE, Exit.CONFIG, Exit.DIVERGED, Exit.CHECKPOINT, Exit.TAKEN)
"""Statuses that all ranks of a run end with together."""
_THIS_PROCESS = uuid.uuid4().hex


@dataclass
class Point:
    """One combination of a sweep's values."""

    number: int
    words: list[str]
    """Its overrides."""
    status: int | None = None
    """Exit status that a run of it alone would have; None until it has ended."""
    reason: str = ""


@dataclass
class SweepLog:
    """The points of a sweep; carried to the jobs that run them."""

    folder: Path | None = None
    """Of the points that other processes run; None where there is no sweep."""
    process: str = _THIS_PROCESS
    """The one that started the sweep."""
    points: dict[int, Point] = field(default_factory=dict)

    def begin(self, sweep_folder: Path) -> None:
        """Start a sweep whose files lie in `sweep_folder`."""
        self.folder = sweep_folder.resolve() / f".sweep-{uuid.uuid4().hex[:8]}"
        self.points.clear()

    @contextmanager
    def point(self, number: int, words: list[str]) -> Iterator[None]:
        """Run a point: note how it ends, and go on after a failure that leaves this process able to.

        Of several ranks only what all of them find alike is passed over, since they run the next point together.
        """
        point = Point(number, words)
        self._note(point)
        try:
            yield
        except SystemExit as ending:
            point.status = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
            point.reason = _in_a_line(ending.__cause__ or ending.__context__ or ending)
            if point.status not in _ALIKE_ON_EVERY_RANK and not _is_alone():
                raise
        except BrokenPipeError:
            raise
        except Exception as error:
            point.status, point.reason = Exit.ERROR, f"{type(error).__name__}: {_in_a_line(error)}"
            traceback.print_exc()
            if not _is_alone():
                raise SystemExit(Exit.ERROR) from error  # Hydra's launcher passes over anything less
        else:
            point.status = 0
        finally:
            self._note(point)

    def _note(self, point: Point) -> None:
        if self.folder is None or os.environ.get("RANK", "0") != "0":
            return
        self.points[point.number] = point
        if self.process != _THIS_PROCESS:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{point.number}.json"
            path.with_suffix(".partial").write_text(json.dumps(asdict(point)), encoding="utf-8")
            path.with_suffix(".partial").replace(path)

    def is_cut_short(self) -> bool:
        """Whether a point began and left no word of its end: its process was killed, say."""
        self._collect()
        return any(point.status is None for point in self.points.values())

    def _collect(self) -> None:
        for path in self.folder.glob("*.json") if self.folder is not None else ():
            point = Point(**parse_json(path.read_text(encoding="utf-8")))
            self.points[point.number] = point

    def end(self) -> Exit:
        """Print what became of the points; return the exit status of the sweep."""
        if self.folder is None or os.environ.get("RANK", "0") != "0":
            return Exit.DONE
        self._collect()
        shutil.rmtree(self.folder, ignore_errors=True)
        points = [self.points[number] for number in sorted(self.points)]
        self.folder = None
        if not points:  # refused before the first
            return Exit.DONE
        has_failed = any(point.status != 0 for point in points)
        print(summary(points), file=sys.stderr if has_failed else sys.stdout, flush=True)
        return Exit.SWEEP if has_failed else Exit.DONE


@cache
def sweep_log() -> SweepLog:
    """Return the log of the sweep that this process starts."""
    return SweepLog()


def summary(points: list[Point]) -> str:
    """Say how many points are done, and of each that is not its own words and the reason."""
    failed = [point for point in points if point.status != 0]
    done = f"Sweep: {len(points) - len(failed)} of {len(points)} points done"
    if not failed:
        return f"{done}."
    common = set.intersection(*(set(point.words) for point in points)) if len(points) > 1 else set()
    lines = [f"{done}, {len(failed)} failed; the same command runs these again:"]
    for point in failed:
        own = " ".join(word for word in point.words if word not in common)
        ending = "no word of its end" if point.status is None else f"status {point.status}"
        lines.append(f"  #{point.number} {own}: {ending}{', ' if point.reason else ''}{point.reason}")
    return "\n".join(lines)


def _in_a_line(error: BaseException) -> str:
    return " ".join(without_credentials(str(error)).split())


def _is_alone() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) == 1
