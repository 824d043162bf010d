"""One process at a time in a folder, on any file system and among any machines.

The lock is a file that names its holder. It comes into being by a hard link, or where there are none by exclusive
creation, and changes hands by a rename, so it needs no file locks: over NFS these may not reach other machines.
The holder touches it every `BEAT_SECONDS`.

A dead holder's lock needs nobody to remove it: the next start takes it over

- at once, where the holder ran on this machine and its process is gone (number and start time), or in an earlier
  start of this SLURM job;
- when it has been silent for `SILENCE_OF_ENDED_JOB` seconds and SLURM no longer has its job;
- when it has been silent for `SILENCE` seconds.

Where it has to, a start waits for so long; it is refused as soon as the holder gives a sign, or where SLURM has
suspended its job.
"""

import contextlib
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from tide_mega.config.errors import ConfigError, StatedError
from tide_mega.config.exits import Exit
from tide_mega.jobs.holder import Holder, JobState, job_state

log = logging.getLogger(__name__)

LOCK_FILE = "in_use.json"
BEAT_SECONDS = 30.0
SILENCE = 300.0
"""Seconds without a touch after which a holder counts as dead; NFS may show a touch a minute late."""
SILENCE_OF_ENDED_JOB = 90.0
_POLL_SECONDS = 5.0
_POLLS_BETWEEN_QUESTIONS = 6
_JOIN_SECONDS = 10.0
_held: "set[FolderLock]" = set()


class FolderTakenError(StatedError, RuntimeError):
    """Another process works in the folder."""

    exit_status = Exit.TAKEN


class FolderLock:
    """Holds a folder as a context; made where it does not exist."""

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
        """Describe the lock.

        Args:
            folder: to be held.
            work: what this process does there, as in "a training".
            key: the configuration key that names the folder.
            sleep: for tests.
            ask_slurm: how a job is.
            on_loss: told when another process took the folder nevertheless; None ends this one at once.
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
        """Give the folder back; more than once does nothing."""
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
        """Show that this process is alive, and see that the folder is still its own."""
        try:
            found = self._look()
            if found is None:  # somebody removed it by hand
                self._own.write_bytes(self.me.dump())
                try:
                    self._create(self.path)
                finally:
                    self._own.unlink(missing_ok=True)
            elif found[0].token == self.me.token:
                os.utime(self.path)
            elif not found[0].is_known:  # a file server's accident: nobody has taken it
                self._own.write_bytes(self.me.dump())
                self._own.replace(self.path)
            else:
                self._on_loss(
                    f"{self._folder} was taken from this process, which gave no sign for long, by "
                    f"{found[0].describe()}: this one must not write there any more, and ends"
                )
        except OSError as error:  # a file server's pause, perhaps: the next may do
            log.debug("%s could not be touched: %s", self.path, error)

    def _take(self) -> bool:
        """Try once; False: what was found has changed meanwhile."""
        if not self._create(self.path) and not self._take_over():
            return False
        found = self._look()
        return found is not None and found[0].token == self.me.token

    def _take_over(self) -> bool:
        """Replace the lock of a dead holder; of several that try at once the claim, named after it, lets one."""
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
        """Wait for a sign of the holder if need be; False: the file has changed hands meanwhile.

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
        """Remove what starts that were killed while they took the folder have left."""
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
        """Make `path` with this process's content unless it exists; whether this did."""
        try:
            os.link(self._own, path)
        except FileExistsError:
            return False
        except OSError:
            if self._own.stat().st_nlink > 1:  # over NFS the answer may be lost, and the link be there
                return True
            try:
                with path.open("xb") as file:
                    file.write(self.me.dump())
            except FileExistsError:
                return False
        return True

    def _look(self, path: Path | None = None) -> tuple[Holder, float] | None:
        """Return holder and last touch, by the file server's clock; None where there is no lock."""
        try:
            with (path or self.path).open("rb") as file:  # opening makes NFS ask the server
                return Holder.parse(file.read()), os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return None

    def _now(self) -> float:
        """Return the time by the file server's clock."""
        os.utime(self._own)
        return self._own.stat().st_mtime

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            self.beat()


def release_held(seconds: float) -> None:
    """Give back what this process holds, before it ends at once; a file server may delay that for `seconds`."""

    def release() -> None:
        for lock in list(_held):
            lock.release()

    thread = threading.Thread(target=release, daemon=True)
    thread.start()
    thread.join(seconds)


def _end_at_once(sentence: str) -> NoReturn:
    log.critical("%s", sentence)
    os._exit(Exit.TAKEN)
