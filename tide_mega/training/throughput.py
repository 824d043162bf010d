"""Speed of training: tokens per second, MFU and time left; peak rates of devices.

- `peak_tflops`: peak arithmetic rate of a device, the denominator of MFU.
- `Throughput`: measures training alone; evaluation and checkpoints are left out.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tide_mega.config.gpus import find_gpu
from tide_mega.parallel.device import DTYPES


def peak_tflops(device_name: str, precision: str) -> float | None:
    """Return the peak TFLOP/s of one device for dense matrix products; None if the device is not known.

    `device_name` is that of torch.cuda.get_device_name, or "cpu". For "cpu" the rate is measured with matrix
    products for about 0.3 s on torch's current threads: an attainable rate, not one from a data sheet.

    Raises:
        ValueError: `precision` is neither bf16 nor fp32.
    """
    if precision not in DTYPES:
        raise ValueError(f"precision is {precision!r}: must be one of bf16, fp32")
    if device_name == "cpu":
        return measured_cpu_tflops(DTYPES[precision])
    gpu = find_gpu(device_name)
    return None if gpu is None else gpu.tflops(precision)


def describe_peak(device_name: str, tflops: float | None, *, configured: bool = False) -> str:
    """Return a line for the start-up log: the peak rate that MFU refers to, and its source.

    `configured` marks a rate that the user set as cluster.peak_tflops.
    """
    if tflops is None:
        return f"MFU is left out: no peak known for {device_name!r}; set cluster.peak_tflops"
    source = "measured with matrix products for 0.3 s" if device_name == "cpu" else "data sheet, dense"
    source = "cluster.peak_tflops" if configured else source
    return f"MFU against {tflops:.4g} TFLOP/s a device ({source})"


def measured_cpu_tflops(dtype: torch.dtype, seconds: float = 0.3, size: int = 1024) -> float:
    """Return the best TFLOP/s of a [size, size] product within `seconds`, after one warm-up product."""
    a = torch.ones(size, size, dtype=dtype)
    b = torch.ones(size, size, dtype=dtype)
    torch.mm(a, b)
    best = float("inf")
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end or best == float("inf"):
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12


@dataclass(frozen=True)
class Reading:
    """Speed since the previous reading."""

    tokens_per_second: float
    """Over all devices."""
    mfu: float | None
    """Model FLOPs utilisation, 0 to 1; None if the device's peak is not known."""
    step_seconds: float
    eta_seconds: float
    """Training time left at the speed of the last readings, without evaluation and checkpoints."""


class Throughput:
    """Measures the speed of windows of steps, with a clock that runs only while the run trains.

    MFU = tokens per second / devices * FLOPs per token / peak FLOPs per second of a device, where FLOPs
    per token is `tide_mega.config.sizes.flops_per_token`: 6 per matrix parameter plus attention. The memory
    tables do not count, since a lookup multiplies nothing.

    On a GPU, call `read` right after the host has synchronised with the device (to fetch the loss, for example);
    otherwise it times the enqueuing of work.
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
        """Take the peak TFLOP/s of one device (or None), the total steps of the run, and the clock.

        The clock `Ledger.training_seconds` leaves out evaluation, checkpoints and the like.
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
        """Start measuring after `step` steps and `tokens` tokens over all devices; earlier ones do not count."""
        self._step, self._tokens = step, tokens
        self._since = self._clock()

    def read(self, step: int, tokens: int) -> Reading:
        """Close the window after `step` steps and `tokens` tokens, and open the next.

        Raises:
            ValueError: not started, or no step since the last reading.
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
