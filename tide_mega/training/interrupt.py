"""Stopping in order: a signal to any process, or the end of the job's time, stops all ranks after the same step.

SLURM sends SIGTERM before it preempts or cancels a job and SIGUSR1 where `--signal` asks for it; a user presses
Ctrl-C. The training loop asks `Agreement.reason` once a step, saves a checkpoint and raises `RunStoppedError`.
"""

import logging
import signal
import threading
import time
from collections.abc import Callable
from datetime import datetime
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from tide_mega.config.errors import StatedError
from tide_mega.config.exits import Exit
from tide_mega.jobs.slurm_job import SlurmJob

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_NOT_ASKED, _TIME_IS_UP = 0, 1
"""What a rank says to the others: one of these, or the number of a signal (all are above 1)."""


class RunStoppedError(StatedError, RuntimeError):
    """The run was asked to stop and has saved where it stands; the same command continues it."""

    exit_status = Exit.STOPPED


class Interrupt:
    """What has asked this process to stop.

    Entered as a context it catches `SIGNALS`. It gives them back on leaving, unless the run is being stopped:
    then the process is on its way out, and a late second signal must not change its exit status.
    """

    def __init__(
        self, stop_at: float | None = None, *, clock: Callable[[], float] = time.time, catches: bool = True
    ) -> None:
        """Wait for signals, and for the time.

        Args:
            stop_at: seconds since 1970 after which the run should stop; None is never.
            clock: seconds since 1970.
            catches: whether entering catches signals; only a process's main thread can.
        """
        self._stop_at, self._clock = stop_at, clock
        self._catches = catches and threading.current_thread() is threading.main_thread()
        self._arrived: list[int] = []
        self._before: dict[signal.Signals, Any] = {}
        self._reported = 0

    def __enter__(self) -> "Interrupt":
        if self._catches:
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stopping = bool(self._arrived) or isinstance(error, RunStoppedError)
        for number, handler in self._before.items():
            if not stopping:
                signal.signal(number, handler)
        self.report_ignored()

    def wish(self) -> int:
        """What this rank has to say: 0, or why it should stop."""
        if self._arrived:
            return self._arrived[0]
        if self._stop_at is not None and self._clock() >= self._stop_at:
            return _TIME_IS_UP
        return _NOT_ASKED

    def report_ignored(self) -> None:
        """Log the signals that came after the first.

        Not done when they come: another log line may be half written then.
        """
        for number in self._arrived[max(1, self._reported) :]:
            log.info("%s came too: already stopping, ignored", signal.Signals(number).name)
        self._reported = len(self._arrived)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._arrived.append(number)


def job_interrupt(stop_before_minutes: float) -> Interrupt:
    """Return the interrupt of this process, which knows when its SLURM job ends; says so in the log."""
    job = SlurmJob.from_environment()
    if job is None or job.end_time is None:
        return Interrupt()
    stop_at = job.end_time - 60 * stop_before_minutes
    left = (stop_at - time.time()) / 60
    log.info(
        "job %s ends at %s: in %.1f minutes the run saves and stops (cluster.stop_before_minutes=%g)",
        job.id,
        datetime.fromtimestamp(job.end_time).astimezone().isoformat(timespec="seconds"),
        max(left, 0.0),
        stop_before_minutes,
    )
    if left <= 0:
        log.warning("that is now: this start makes one or two steps; lower cluster.stop_before_minutes")
    return Interrupt(stop_at)


class Agreement:
    """Brings all ranks to the same answer at the same step.

    One element is reduced over all ranks while the next step computes, and read after it: nobody waits, and a
    signal stops the run at most two steps later. Alone, a process answers at once.
    """

    def __init__(self, interrupt: Interrupt, group: ProcessGroup | None = None) -> None:
        """Agree among a group that moves host memory, so that reading the answer does not wait for a GPU."""
        self._interrupt, self._group = interrupt, group
        self._flag = torch.zeros((), dtype=torch.int32)
        self._under_way: Any = None
        self._alone = not dist.is_initialized() or dist.get_world_size() == 1

    def reason(self) -> str | None:
        """Why all ranks stop after this step, or None; collective, once a step."""
        if self._alone:
            return _describe(self._interrupt.wish())
        answer = _NOT_ASKED
        if self._under_way is not None:
            self._under_way.wait()
            answer = int(self._flag)
        self._flag = torch.tensor(self._interrupt.wish(), dtype=torch.int32)
        self._under_way = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return _describe(answer)

    def close(self) -> None:
        """Wait for what is under way; collective, at the end of the loop."""
        if self._under_way is not None:
            self._under_way.wait()
            self._under_way = None


def _describe(wish: int) -> str | None:
    if wish == _NOT_ASKED:
        return None
    return "the job's time is nearly up" if wish == _TIME_IS_UP else f"{signal.Signals(wish).name} came"
