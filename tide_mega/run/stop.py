"""Orderly stop: a signal to any process, or the end of the job's time, stops all ranks after the same step.

SLURM sends SIGTERM before it preempts or cancels a job, and SIGUSR1 if `--signal` asks for it; a user presses
Ctrl-C. The training loop calls `Agreement.reason` once a step, saves a checkpoint and raises `RunStoppedError`.
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

from tide_mega.errors import Exit, StatedError
from tide_mega.jobs.slurm import SlurmJob

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_NOT_ASKED, _TIME_IS_UP = 0, 1
"""Values that a rank sends to the others: one of these, or a signal number (all are above 1)."""


class RunStoppedError(StatedError, RuntimeError):
    """The run was asked to stop and has saved a checkpoint; the same command continues it."""

    exit_status = Exit.STOPPED


class Interrupt:
    """Collects requests to stop this process.

    As a context manager it catches `SIGNALS` and restores their handlers on exit, unless the run is being
    stopped: then the process is about to end, and a late second signal must not change its exit status.
    """

    def __init__(
        self, stop_at: float | None = None, *, clock: Callable[[], float] = time.time, catches: bool = True
    ) -> None:
        """Prepare to watch for signals and the time limit.

        Args:
            stop_at: Unix time after which the run should stop; None means never.
            clock: Unix time in seconds.
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
        """Return 0, or this rank's reason to stop."""
        if self._arrived:
            return self._arrived[0]
        if self._stop_at is not None and self._clock() >= self._stop_at:
            return _TIME_IS_UP
        return _NOT_ASKED

    def report_ignored(self) -> None:
        """Log the signals that arrived after the first.

        Not logged on arrival, when another log line may be half written.
        """
        for number in self._arrived[max(1, self._reported) :]:
            log.info("%s came too: already stopping, ignored", signal.Signals(number).name)
        self._reported = len(self._arrived)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._arrived.append(number)


def job_interrupt(stop_before_minutes: float) -> Interrupt:
    """Return the interrupt of this process with the end time of its SLURM job, which is logged."""
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
    """Makes all ranks decide to stop at the same step.

    One element is all-reduced while the next step computes, and read after it: no rank waits, and a signal stops
    the run at most two steps later. A single process decides at once.
    """

    def __init__(self, interrupt: Interrupt, group: ProcessGroup | None = None) -> None:
        """Use a group for host memory, so that reading the result does not wait for a GPU."""
        self._interrupt, self._group = interrupt, group
        self._flag = torch.zeros((), dtype=torch.int32)
        self._under_way: Any = None
        self._alone = not dist.is_initialized() or dist.get_world_size() == 1

    def reason(self) -> str | None:
        """Return why all ranks stop after this step, or None; collective, call once a step."""
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
        """Wait for the running reduction; collective, call at the end of the loop."""
        if self._under_way is not None:
            self._under_way.wait()
            self._under_way = None


def _describe(wish: int) -> str | None:
    if wish == _NOT_ASKED:
        return None
    return "the job's time is nearly up" if wish == _TIME_IS_UP else f"{signal.Signals(wish).name} came"
