"""Tokens per second, MFU and time to the end, of training itself."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    """Speed since the reading before."""

    tokens_per_second: float
    """Over all devices."""
    mfu: float | None
    """Model FLOPs utilisation, 0 to 1; None where the device's peak is not known."""
    step_seconds: float
    eta_seconds: float
    """Training time left at the pace of the last readings; evaluation and checkpoints come on top."""


class Throughput:
    """Measures windows of steps, by a clock that runs only while the run trains.

    MFU = tokens per second / devices * FLOPs per token / peak FLOPs per second of a device, where FLOPs
    per token is `tide_mega.config.sizes.flops_per_token`: 6 per matrix parameter plus attention; the
    memory tables are not in it, a lookup multiplies nothing.

    On a GPU, call `read` where the host has just waited for the device (to fetch the loss, say), else
    it times the enqueuing of work.
    """

    def __init__(
        self,
        *,
        flops_per_token: float,
        devices: int,
        peak_tflops: float | None,
        total_steps: int,
        eta_windows: int = 20,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Take the peak TFLOP/s of one device (or None), the steps of the whole run, and the clock:

        `Ledger.training_seconds` leaves out evaluation, checkpoints and the like.
        """
        self._flops_per_token = flops_per_token
        self._devices = devices
        self._peak_tflops = peak_tflops
        self._total_steps = total_steps
        self._clock = clock
        self._windows: deque[tuple[int, float]] = deque(maxlen=eta_windows)
        self._step: int | None = None
        self._tokens = 0
        self._since = 0.0

    def start(self, step: int, tokens: int) -> None:
        """Begin, with so many steps done and tokens read over all devices (those before a resume are not ours)."""
        self._step, self._tokens = step, tokens
        self._since = self._clock()

    def read(self, step: int, tokens: int) -> Reading:
        """Close the window, with so many steps done and tokens read, and open the next.

        Raises:
            ValueError: if not started, or if no step was done since the last reading.
        """
        if self._step is None:
            raise ValueError("the meter is not started: call start before read")
        steps = step - self._step
        if steps <= 0:
            raise ValueError(f"no step since the last reading: {self._step} steps then, {step} now")
        now = self._clock()
        seconds = max(now - self._since, 1e-9)
        tokens_per_second = (tokens - self._tokens) / seconds
        self._step, self._tokens, self._since = step, tokens, now
        self._windows.append((steps, seconds))
        mfu = None
        if self._peak_tflops is not None:
            flops_per_device = tokens_per_second / self._devices * self._flops_per_token
            mfu = flops_per_device / (self._peak_tflops * 1e12)
        pace = sum(s for _, s in self._windows) / sum(n for n, _ in self._windows)
        assert self._step is not None
        return Reading(
            tokens_per_second=tokens_per_second,
            mfu=mfu,
            step_seconds=seconds / steps,
            eta_seconds=max(self._total_steps - self._step, 0) * pace,
        )
