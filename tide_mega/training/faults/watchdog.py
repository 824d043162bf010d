"""Watchdog: dumps every thread's stack and ends a run that makes no progress, so that it can be restarted."""

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tide_mega.config.schema import TideConfig
from tide_mega.errors import Exit
from tide_mega.jobs.lock import release_held

_GRACE_SECONDS = 10.0
"""Delay between report and exit: the exit of one rank would end the others before they report."""


def hang_seconds(config: TideConfig) -> float:
    """Return how long a rank may lack progress: `faults.hang_minutes`, or 2/3 of the collectives' timeout."""
    minutes = config.faults.hang_minutes
    return 60 * (config.cluster.timeout_minutes * 2 / 3 if minutes is None else minutes)


def _end(status: int) -> None:
    release_held(seconds=5.0)
    os._exit(status)


class Watchdog:
    """A thread that ends the process if `beat` is not called for too long.

    One hung rank leaves all others waiting in a collective. Each dumps its stacks, and the one whose stack is
    not in a collective is the culprit. The watchdog must act before the timeout of the collectives, which would
    end the waiting ranks, and with them the job, before the culprit's stack is written.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        seconds: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        end: Callable[[int], object] | None = None,
    ) -> None:
        """Set up the watchdog without starting it.

        Args:
            folder: for rank-R.txt; created when needed.
            rank: of this process.
            seconds: longest time between two beats; 0 disables the watchdog.
            clock: for tests.
            end: takes the exit status and ends the process at once; None also releases the run folder first.
        """
        self.path = folder / f"rank-{rank}.txt"
        self._rank, self._seconds, self._clock, self._end = rank, seconds, clock, end or _end
        self._last, self._phase = clock(), "start-up"
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start watching."""
        self.beat(self._phase)
        if self._seconds > 0 and self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def beat(self, phase: str | None = None) -> None:
        """Report progress and the phase that begins (None: the same phase continues)."""
        self._last = self._clock()
        if phase is not None:
            self._phase = phase

    def seconds_left(self) -> float:
        """Return the seconds until the time limit."""
        return self._last + self._seconds - self._clock()

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(max(self.seconds_left(), 0.01)):
            if self.seconds_left() <= 0:
                self.report()
                self._stop.wait(min(_GRACE_SECONDS, 0.1 * self._seconds))
                self._end(Exit.HUNG)
                return

    def report(self) -> None:
        """Write every thread's Python stack to the file and to stderr."""
        text = (
            f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {self._rank} on {socket.gethostname()}: no progress for "
            f"{self._clock() - self._last:.0f} s in {self._phase!r}; ending with status {Exit.HUNG.value}\n"
        )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                os.fsync(file.fileno())
        except OSError as error:  # a full disk must not keep a hung process alive
            text += f"{self.path} could not be written: {error}\n"
        stream = sys.__stderr__
        if stream is not None:
            stream.write(f"[rank {self._rank}] {text}")
            stream.flush()
            faulthandler.dump_traceback(stream, all_threads=True)
