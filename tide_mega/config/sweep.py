"""Sweeps: keeps account of their points, and adopts the ranks of jobs that Hydra's submitit launcher started.

A point that fails does not keep others from running, and all are listed in a summary. Points that run in the
process that started the sweep are kept in memory. Those that run as cluster jobs each leave a file in a folder
of `hydra.sweep.dir`, which is removed after the summary.

In a submitit job SLURM's variables are translated to those of torch.distributed (`adopt_ranks`).
"""

import json
import os
import shutil
import subprocess
import sys
import traceback
import uuid
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

from tide_mega.errors import Exit, without_credentials
from tide_mega.files import parse_json

FIRST_PORT, PORTS = 20_000, 12_000
"""Port range below the ephemeral ports; `slurm/body.sh` uses the same."""


def adopt_ranks(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, WORLD_SIZE and related variables in a submitit job; do nothing in any other process."""
    if environment.get("SUBMITIT_EXECUTOR") != "slurm" or "RANK" in environment:
        return
    nodes = _hostnames(environment["SLURM_JOB_NODELIST"])
    job, restarts = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_RESTART_COUNT") or 0)
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["WORLD_SIZE"] = environment["SLURM_NTASKS"]
    environment["LOCAL_WORLD_SIZE"] = str(int(environment["SLURM_NTASKS"]) // len(nodes))
    environment.setdefault("MASTER_ADDR", "127.0.0.1" if len(nodes) == 1 else nodes[0])
    environment.setdefault("MASTER_PORT", str(FIRST_PORT + (job + 131 * restarts) % PORTS))
    if len(nodes) == 1:
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _hostnames(node_list: str) -> list[str]:
    if "[" not in node_list:
        return node_list.split(",")
    command = ["scontrol", "show", "hostnames", node_list]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


_ALIKE_ON_EVERY_RANK = (Exit.DONE, Exit.CONFIG, Exit.DIVERGED, Exit.CHECKPOINT, Exit.TAKEN)
"""Statuses with which all ranks of a run end together."""
_THIS_PROCESS = uuid.uuid4().hex


@dataclass
class Point:
    """One combination of a sweep's values."""

    number: int
    words: list[str]
    """Its overrides."""
    status: int | None = None
    """Exit status that a separate run of this point would have; None until it has ended."""
    reason: str = ""


@dataclass
class SweepLog:
    """The points of a sweep; sent along to the jobs that run them."""

    folder: Path | None = None
    """Folder for the points that other processes run; None if there is no sweep."""
    process: str = _THIS_PROCESS
    """The process that started the sweep."""
    points: dict[int, Point] = field(default_factory=dict)

    def begin(self, sweep_folder: Path) -> None:
        """Start a sweep with its files in `sweep_folder`."""
        self.folder = sweep_folder.resolve() / f".sweep-{uuid.uuid4().hex[:8]}"
        self.points.clear()

    @contextmanager
    def point(self, number: int, words: list[str]) -> Iterator[None]:
        """Run a point: record how it ends, and continue after a failure if this process is able to.

        With several ranks, only failures that all of them share are passed over, since they run the next point
        together.
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
                raise SystemExit(Exit.ERROR) from error  # Hydra's launcher ignores any lesser exception
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
        """Return whether a point began but never recorded its end, for example because its process was killed."""
        self._collect()
        return any(point.status is None for point in self.points.values())

    def _collect(self) -> None:
        for path in self.folder.glob("*.json") if self.folder is not None else ():
            point = Point(**parse_json(path.read_text(encoding="utf-8")))
            self.points[point.number] = point

    def end(self) -> Exit:
        """Print the summary of the points; return the exit status of the sweep."""
        if self.folder is None or os.environ.get("RANK", "0") != "0":
            return Exit.DONE
        self._collect()
        shutil.rmtree(self.folder, ignore_errors=True)
        points = [self.points[number] for number in sorted(self.points)]
        self.folder = None
        if not points:  # refused before the first point
            return Exit.DONE
        has_failed = any(point.status != 0 for point in points)
        print(summary(points), file=sys.stderr if has_failed else sys.stdout, flush=True)
        return Exit.SWEEP if has_failed else Exit.DONE


@cache
def sweep_log() -> SweepLog:
    """Return the log of the sweep that this process starts."""
    return SweepLog()


def summary(points: list[Point]) -> str:
    """Return how many points are done, and for each other point its overrides and the reason."""
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
