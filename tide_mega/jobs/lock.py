"""Locks a folder for one process at a time, on any file system and among any machines.

The lock is a file that names its holder: host, process, SLURM job. It is created by a hard link, or where there
are none by exclusive creation, and changes hands by a rename, so it needs no file locks, which over NFS may not
reach other machines. The holder touches it every `BEAT_SECONDS`.

A dead holder's lock needs nobody to remove it. The next start takes it over

- at once, if the holder ran on this machine and its process is gone (checked by process id and start time), or
  in an earlier start of this SLURM job;
- after `SILENCE_OF_ENDED_JOB` seconds without a touch, if SLURM no longer has its job;
- after `SILENCE` seconds without a touch.

If necessary a start waits that long; it is refused as soon as the holder touches the lock, or if SLURM has
suspended the holder's job.
"""

import contextlib
import itertools
import json
import logging
import os
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import psutil

from tide_mega.errors import ConfigError, Exit, StatedError
from tide_mega.files import parse_json
from tide_mega.jobs.slurm import SlurmJob

log = logging.getLogger(__name__)


_SQUEUE_SECONDS = 20.0
_HIDDEN = -1
"""Stands for the start time of a process whose start time is not visible."""

LOCK_FILE = "in_use.json"
BEAT_SECONDS = 30.0
SILENCE = 300.0
"""Seconds without a touch after which a holder counts as dead; NFS may show a touch a minute late."""
SILENCE_OF_ENDED_JOB = 90.0
_POLL_SECONDS = 5.0
_POLLS_BETWEEN_QUESTIONS = 6
_JOIN_SECONDS = 10.0
_held: "set[FolderLock]" = set()


class JobState(Enum):
    """State of a SLURM job."""

    RUNNING = "running"
    SUSPENDED = "suspended"
    """Its processes are alive but stopped."""
    ENDED = "ended"
    """It has left the queue, or is requeued and waiting."""
    UNKNOWN = "unknown"
    """SLURM cannot be queried."""


@dataclass(frozen=True)
class Holder:
    """A process that holds a folder."""

    token: str
    """Random id of this lock."""
    work: str
    """What the process does there, such as "a training"."""
    host: str
    pid: int
    since: str
    """When it took the folder, with time zone."""
    machine: str | None
    """Identifies the machine's boot and its PID namespace; None if not available."""
    started: int | None
    """Start time of the process in ticks since boot, since process ids are reused."""
    job: str | None = None
    """SLURM job id."""
    restarts: int = 0
    """How often SLURM had restarted this job."""
    cluster: str | None = None

    @classmethod
    def this_process(cls, work: str) -> "Holder":
        """Return this process as a holder, with a new token."""
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
        """Parse a lock file; one that is unreadable (being written, or truncated) gives an unknown holder."""
        try:
            kept = parse_json(content)
            return cls(**{field.name: kept[field.name] for field in fields(cls)})
        except (ValueError, KeyError, TypeError):
            return cls(content.hex()[:64], "something", "an unknown host", 0, "an unknown time", None, None)

    @property
    def is_known(self) -> bool:
        """Whether the lock file could be read."""
        return self.pid > 0

    def describe(self) -> str:
        """Return the holder as text for messages."""
        job = f", SLURM job {self.job}" if self.job else ""
        return f"{self.work} (process {self.pid} on {self.host}{job}, since {self.since})"

    def is_alive(self, asking: "Holder") -> bool | None:
        """Return whether it is alive, as far as the process `asking` can tell immediately; None if unknown."""
        if self.machine is not None and self.machine == asking.machine:
            started = started_at(self.pid)
            return None if started == _HIDDEN else started == self.started
        if self._is_same_job(asking) and asking.restarts > self.restarts:
            return False  # SLURM restarts a job only after all of its processes have ended
        return None

    def ask_slurm(self, asking: "Holder", ask: Callable[[str], JobState]) -> JobState:
        """Return the state of its SLURM job, if it has one and `asking` seems to be on the same cluster."""
        if self.job is None or (asking.cluster or self.cluster) != self.cluster:
            return JobState.UNKNOWN
        return ask(self.job)

    def _is_same_job(self, other: "Holder") -> bool:
        return self.job is not None and (self.job, self.cluster) == (other.job, other.cluster)


def job_state(job: str) -> JobState:
    """Query the state of a SLURM job."""
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
    """Return a local process's start time in ticks since boot; None if it has ended, `_HIDDEN` if not visible."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return _HIDDEN if psutil.pid_exists(pid) else None  # another user's process may be hidden
    state, *numbers = stat.rpartition(")")[2].split()
    return None if state in "ZX" else int(numbers[18])


def _machine() -> str | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


class FolderTakenError(StatedError, RuntimeError):
    """Another process is using the folder."""

    exit_status = Exit.TAKEN


class FolderLock:
    """Context manager that locks a folder; the folder is created if missing."""

    def __init__(
        self,
        folder: Path,
        work: str,
        *,
        key: str,
        sleep: Callable[[float], object] = time.sleep,
        ask_slurm: Callable[[str], JobState] = job_state,
        on_loss: Callable[[str], object] | None = None,
    ) -> None:
        """Set up the lock without taking it.

        Args:
            folder: to be locked.
            work: what this process does there, such as "a training".
            key: the configuration key that names the folder.
            sleep: for tests.
            ask_slurm: returns the state of a job.
            on_loss: called if another process takes the folder anyway; None ends this process at once.
        """
        self.path = folder / LOCK_FILE
        self.me = Holder.this_process(work)
        self._folder, self._key = folder, key
        self._sleep, self._ask_slurm, self._on_loss = sleep, ask_slurm, on_loss or _end_at_once
        self._own = folder / f".{LOCK_FILE}.{self.me.token}"
        self._released = threading.Event()
        self._beating: threading.Thread | None = None

    def __enter__(self) -> "FolderLock":
        """Take the folder.

        Raises:
            FolderTakenError: another process holds it.
            ConfigError: nothing can be written there.
        """
        try:
            self._folder.resolve().mkdir(parents=True, exist_ok=True)
            self._own.write_bytes(self.me.dump())
            try:
                while not self._take():
                    pass
            finally:
                self._own.unlink(missing_ok=True)
            self._tidy()
        except OSError as error:
            raise ConfigError(
                f"{self._key}={self._folder} cannot be written ({error.strerror or error}): give another folder."
            ) from error
        _held.add(self)
        self._beating = threading.Thread(target=self._beat, name="folder-lock", daemon=True)
        self._beating.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Release the folder; further calls do nothing."""
        self._released.set()
        _held.discard(self)
        if self._beating is not None:
            self._beating.join(_JOIN_SECONDS)
        try:
            if (found := self._look()) is not None and found[0].token == self.me.token:
                self.path.unlink()
        except OSError as error:
            log.warning("%s could not be removed: %s", self.path, error)

    def beat(self) -> None:
        """Touch the lock to show that this process is alive, and check that it still holds the folder."""
        try:
            found = self._look()
            if found is None:  # someone removed it by hand
                self._own.write_bytes(self.me.dump())
                try:
                    self._create(self.path)
                finally:
                    self._own.unlink(missing_ok=True)
            elif found[0].token == self.me.token:
                os.utime(self.path)
            elif not found[0].is_known:  # corrupted by the file server: nobody has taken it
                self._own.write_bytes(self.me.dump())
                self._own.replace(self.path)
            else:
                self._on_loss(
                    f"{self._folder} was taken from this process, which gave no sign for long, by "
                    f"{found[0].describe()}: this one must not write there any more, and ends"
                )
        except OSError as error:  # perhaps a hiccup of the file server: the next beat may succeed
            log.debug("%s could not be touched: %s", self.path, error)

    def _take(self) -> bool:
        """Try once to take the lock; False if its file changed in the meantime."""
        if not self._create(self.path) and not self._take_over():
            return False
        found = self._look()
        return found is not None and found[0].token == self.me.token

    def _take_over(self) -> bool:
        """Replace the lock of a dead holder; a claim file named after it admits one of several contenders."""
        found = self._look()
        if found is None:
            return False
        holder = found[0]
        if not self._is_dead(holder, self.path):
            return False
        claim = self.path.with_name(f".{LOCK_FILE}.after-{holder.token}")
        if not self._create(claim):
            claimant = self._look(claim)
            if claimant is not None and self._is_dead(claimant[0], claim):
                claim.unlink(missing_ok=True)
            return False
        again = self._look()
        if again is None or again[0].token != holder.token:
            claim.unlink(missing_ok=True)
            return False
        try:
            claim.rename(self.path)
        except FileNotFoundError:
            return False
        log.warning("%s was left by %s, which is gone: taken over", self._folder, holder.describe())
        return True

    def _is_dead(self, holder: Holder, path: Path) -> bool:
        """Wait for a sign of life of the holder if necessary; False if the lock changed hands in the meantime.

        Raises:
            FolderTakenError: it is alive.
        """
        alive = holder.is_alive(self.me)
        first = self._look(path)
        if alive is False or first is None:
            return alive is False
        if alive:
            self._refuse(holder)
        limit = SILENCE
        for poll in itertools.count():
            found = self._look(path)
            if found is None or found[0].token != holder.token:
                return False
            if found[1] != first[1]:
                self._refuse(holder)
            if poll % _POLLS_BETWEEN_QUESTIONS == 0:
                job = holder.ask_slurm(self.me, self._ask_slurm)
                if job is JobState.SUSPENDED:
                    self._refuse(holder)
                limit = SILENCE_OF_ENDED_JOB if job is JobState.ENDED else SILENCE
            left = limit - (self._now() - found[1])
            if left <= 0:
                return True
            if poll == 0:
                said = "%s is held by %s; waiting up to %.0f s for a sign of it"
                log.warning(said, self._folder, holder.describe(), left)
            self._sleep(min(_POLL_SECONDS, left))
        raise AssertionError

    def _tidy(self) -> None:
        """Remove files left by starts that were killed while taking the lock."""
        now = self.path.stat().st_mtime
        for path in self._folder.glob(f".{LOCK_FILE}.*"):
            with contextlib.suppress(FileNotFoundError):
                if now - path.stat().st_mtime > SILENCE:
                    path.unlink()

    def _refuse(self, holder: Holder) -> NoReturn:
        raise FolderTakenError(
            f"{self._folder} is in use by {holder.describe()}: wait for its end or stop it, or choose another "
            f"{self._key}."
        )

    def _create(self, path: Path) -> bool:
        """Create `path` with this process's content unless it exists; return whether it was created."""
        try:
            os.link(self._own, path)
        except FileExistsError:
            return False
        except OSError:
            if self._own.stat().st_nlink > 1:  # over NFS the reply may be lost although the link was made
                return True
            try:
                with path.open("xb") as file:
                    file.write(self.me.dump())
            except FileExistsError:
                return False
        return True

    def _look(self, path: Path | None = None) -> tuple[Holder, float] | None:
        """Return holder and time of last touch by the file server's clock; None if there is no lock."""
        try:
            with (path or self.path).open("rb") as file:  # opening makes NFS query the server
                return Holder.parse(file.read()), os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return None

    def _now(self) -> float:
        """Return the current time by the file server's clock."""
        os.utime(self._own)
        return self._own.stat().st_mtime

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            self.beat()


def release_held(seconds: float) -> None:
    """Release all locks of this process before it exits immediately; waits at most `seconds` for a file server."""

    def release() -> None:
        for lock in list(_held):
            lock.release()

    thread = threading.Thread(target=release, daemon=True)
    thread.start()
    thread.join(seconds)


def _end_at_once(sentence: str) -> NoReturn:
    log.critical("%s", sentence)
    os._exit(Exit.TAKEN)
