"""How long a rank computes, as opposed to waiting for others."""

import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

import torch

from tide_mega.parallel.device import Device


class OwnTime:
    """A stopwatch around forward and backward, where data parallelism does not communicate; used again and again.

    On a GPU two events on the stream are its ends, and it reads only what has happened: it never waits, and a
    step's time may come with the next step. Tensor and pipeline parallelism and ZeRO-3 wait for each other inside,
    so that all ranks of a replica (with ZeRO-3, of the world) show the time of the slowest.
    """

    def __init__(self, device: Device, clock: Callable[[], float] = time.perf_counter) -> None:
        self._is_cuda, self._clock = device.is_cuda, clock
        self._began = 0.0
        self._seconds = 0.0
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def __enter__(self) -> "OwnTime":
        if self._is_cuda:
            self._pending.append((self._event(), torch.cuda.Event(enable_timing=True)))
        else:
            self._began = self._clock()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_cuda:
            self._pending[-1][1].record()
        else:
            self._seconds += self._clock() - self._began

    def take(self) -> float:
        """Seconds measured since the last call, as far as they are known."""
        while self._pending and self._pending[0][1].query():
            begin, end = self._pending.popleft()
            self._seconds += begin.elapsed_time(end) / 1e3
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    @staticmethod
    def _event() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
