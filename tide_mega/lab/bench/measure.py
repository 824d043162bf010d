"""Measurement tools: timing in turns, resident memory, memory bandwidth.

Actions take turns, each split into named regions; medians and spread are over the turns. Resident memory is that
of this process, or of a task run in a fresh one (Linux). The measured memory bandwidth turns byte counts into a
floor of time.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_CYCLES_PER_SECOND = 2e9
"""Approximate GPU clock: the idle time need not be exact."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""

    @staticmethod
    def of(values: list[float]) -> "Spread":
        """Summarise at least one value."""
        if len(values) == 1:
            return Spread(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high)


class Stopwatch:
    """Splits an action's time into named regions, by the device's clock; regions of equal name add up."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        """A region and its end: an event, or seconds."""

    def start(self, lead_seconds: float = 0.0) -> None:
        """Start the clock; a GPU first idles for `lead_seconds`, which hides the host's launch overhead."""
        if self._is_cuda:
            torch.cuda.synchronize()
            if lead_seconds:
                torch.cuda._sleep(int(lead_seconds * _CYCLES_PER_SECOND))
        self._marks = []
        self.mark("")

    def mark(self, region: str) -> None:
        """End `region`, which began at the previous mark; does not synchronise."""
        if self._is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((region, event))
        else:
            self._marks.append((region, time.perf_counter()))

    def read(self) -> dict[str, float]:
        """Wait for the device; return the seconds of each region."""
        if self._is_cuda:
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        for (_, begin), (region, end) in zip(self._marks, self._marks[1:], strict=False):
            took = begin.elapsed_time(end) / 1e3 if self._is_cuda else end - begin
            seconds[region] = seconds.get(region, 0.0) + took
        return seconds


def take_turns(
    actions: dict[str, Callable[[Stopwatch], None]],
    repeats: int,
    device: torch.device,
    *,
    warmup: int = 1,
    host_ahead: bool = False,
) -> dict[str, dict[str, list[float]]]:
    """Run every action `repeats` times in turns (A B A B ...), so that drift affects all equally.

    Args:
        actions: each marks its regions on the watch it is given.
        repeats: timed turns.
        device: whose clock is used.
        warmup: untimed turns before.
        host_ahead: on a GPU, let the host queue the whole action before the first kernel runs, so that short
            kernels are timed without their launches.

    Returns:
        For each action, the seconds of each region and of "total", one value per turn.
    """
    watch = Stopwatch(device)
    leads = dict.fromkeys(actions, 0.0)
    for _ in range(warmup):
        for name, action in actions.items():
            watch.start()
            begin = time.perf_counter()
            action(watch)
            leads[name] = 1.5 * (time.perf_counter() - begin) if host_ahead else 0.0
            watch.read()
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            watch.start(leads[name])
            action(watch)
            turns[name].append(watch.read())
    return {name: _columns(found) for name, found in turns.items()}


def _columns(turns: list[dict[str, float]]) -> dict[str, list[float]]:
    columns = {region: [turn[region] for turn in turns] for region in turns[0]}
    return {**columns, "total": [sum(turn.values()) for turn in turns]}


EXACT_FREE = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Makes the allocator return freed memory, so that resident size is what the process uses."""


def resident(key: str) -> int:
    """Return bytes of this process: VmRSS is resident now, VmHWM the peak since `forget_peak`."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def forget_peak() -> None:
    """Reset VmHWM to the current resident size."""
    Path("/proc/self/clear_refs").write_text("5")


def in_fresh_process(module: str, task: dict[str, Any], threads: int) -> dict[str, int]:
    """Run `python -m module <task as JSON>`; return the JSON of its last line.

    Raises:
        RuntimeError: it failed; its last words are shown.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, json.dumps(task)],
        env={**os.environ, **EXACT_FREE, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise RuntimeError(f"{module} with {task} ended with status {done.returncode}\n{last}")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


GPU_BYTES, CPU_BYTES = 1 << 30, 1 << 28
"""Bytes per tensor, so large that caches (50 MB on an H100, 10s to 100s of MB on server CPUs) hold little."""


def measure_bandwidth(device: torch.device, repeats: int = 7, size: int | None = None) -> float:
    """Return bytes per second, read plus written, of the better of a copy and a triad (c = a + 3 b).

    It is the best of the repeats, since other work on the machine can only slow it down. On a CPU a store also
    reads the line it writes, unless it bypasses the caches; that is not counted, so work that mostly reads can
    beat a floor based on this.

    Args:
        device: to measure.
        repeats: of each.
        size: bytes of each tensor.
    """
    values = (size or (GPU_BYTES if device.type == "cuda" else CPU_BYTES)) // 4
    a, b, c = (torch.ones(values, device=device) for _ in range(3))

    def copy(watch: Stopwatch) -> None:
        c.copy_(a)
        watch.mark("copy")

    def triad(watch: Stopwatch) -> None:
        torch.add(a, b, alpha=3.0, out=c)
        watch.mark("triad")

    found = take_turns({"copy": copy, "triad": triad}, repeats, device)
    moved = {"copy": 8 * values, "triad": 12 * values}
    return max(moved[name] / min(found[name]["total"]) for name in moved)
