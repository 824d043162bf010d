"""Who holds a folder, as its lock file says, and whether that process is alive."""

import json
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from enum import Enum
from pathlib import Path

import psutil

from tide_mega.config.stored import parse_json
from tide_mega.jobs.slurm_job import SlurmJob

_SQUEUE_SECONDS = 20.0
_HIDDEN = -1
"""In place of the time when a process began, where that is not shown."""


class JobState(Enum):
    """How a SLURM job is."""

    RUNNING = "running"
    SUSPENDED = "suspended"
    """Its processes live and do nothing."""
    ENDED = "ended"
    """It has left the queue, or waits there to be started again."""
    UNKNOWN = "unknown"
    """SLURM cannot be asked."""


@dataclass(frozen=True)
class Holder:
    """A process that holds a folder."""

    token: str
    """Random: of this lock alone."""
    work: str
    """What it does there, as in "a training"."""
    host: str
    pid: int
    since: str
    """When it took the folder, with its time zone."""
    machine: str | None
    """Identity of the boot of its machine and of its process numbers, None where there is none to be had."""
    started: int | None
    """When the process began, in ticks since the boot: process numbers are used again."""
    job: str | None = None
    """Of SLURM."""
    restarts: int = 0
    """How often SLURM had started this job again."""
    cluster: str | None = None

    @classmethod
    def this_process(cls, work: str) -> "Holder":
        """Describe this process, with a new token."""
        job = SlurmJob.from_environment()
        return cls(
            token=secrets.token_hex(8),
            work=work,
            host=socket.gethostname(),
            pid=os.getpid(),
            since=time.strftime("%Y-%m-%d %H:%M:%S %z"),
            machine=_machine(),
            started=started_at(os.getpid()),
            job=job.id if job else None,
            restarts=job.restarts if job else 0,
            cluster=job.cluster if job else None,
        )

    def dump(self) -> bytes:
        """Return the content of a lock file."""
        return json.dumps(asdict(self), indent=1).encode() + b"\n"

    @classmethod
    def parse(cls, content: bytes) -> "Holder":
        """Read it; of what cannot be read (it is being written, or was cut off) nothing is known."""
        try:
            kept = parse_json(content)
            return cls(**{field.name: kept[field.name] for field in fields(cls)})
        except (ValueError, KeyError, TypeError):
            return cls(content.hex()[:64], "something", "an unknown host", 0, "an unknown time", None, None)

    @property
    def is_known(self) -> bool:
        """Whether its lock file could be read."""
        return self.pid > 0

    def describe(self) -> str:
        """Say who it is."""
        job = f", SLURM job {self.job}" if self.job else ""
        return f"{self.work} (process {self.pid} on {self.host}{job}, since {self.since})"

    def is_alive(self, asking: "Holder") -> bool | None:
        """Whether it lives, as far as the process `asking` can know at once; None in doubt."""
        if self.machine is not None and self.machine == asking.machine:
            started = started_at(self.pid)
            return None if started == _HIDDEN else started == self.started
        if self._is_same_job(asking) and asking.restarts > self.restarts:
            return False  # SLURM starts a job again when all of its processes have ended
        return None

    def ask_slurm(self, asking: "Holder", ask: Callable[[str], JobState]) -> JobState:
        """What SLURM says of its job, where it has one and `asking` is on the same cluster as far as is known."""
        if self.job is None or (asking.cluster or self.cluster) != self.cluster:
            return JobState.UNKNOWN
        return ask(self.job)

    def _is_same_job(self, other: "Holder") -> bool:
        return self.job is not None and (self.job, self.cluster) == (other.job, other.cluster)


def job_state(job: str) -> JobState:
    """Ask SLURM how a job is."""
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_SQUEUE_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return JobState.UNKNOWN
    if done.returncode:
        return JobState.ENDED if "Invalid job id" in done.stderr else JobState.UNKNOWN
    states = {state.strip() for state in done.stdout.splitlines()} - {"", "PENDING"}
    if states & {"SUSPENDED", "STOPPED"}:
        return JobState.SUSPENDED
    return JobState.RUNNING if states else JobState.ENDED


def started_at(pid: int) -> int | None:
    """Return when a process of this machine began, in ticks since the boot; None if it has ended, or `_HIDDEN`."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return _HIDDEN if psutil.pid_exists(pid) else None  # another user's may not be shown
    state, *numbers = stat.rpartition(")")[2].split()
    return None if state in "ZX" else int(numbers[18])


def _machine() -> str | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None
