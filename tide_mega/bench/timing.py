"""Timing side by side: actions take turns, each with named regions; medians and spread over the turns."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_CYCLES_PER_SECOND = 2e9
"""About a GPU's clock: how long the GPU idles need not be exact."""


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
    """Splits one action's time into named regions, on the device's own clock; regions of one name add up."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        """A region and when it ended: an event, or seconds."""

    def start(self, lead_seconds: float = 0.0) -> None:
        """Begin. On a GPU let it idle for `lead_seconds`, so that the host's launching does not show."""
        if self._is_cuda:
            torch.cuda.synchronize()
            if lead_seconds:
                torch.cuda._sleep(int(lead_seconds * _CYCLES_PER_SECOND))
        self._marks = []
        self.mark("")

    def mark(self, region: str) -> None:
        """End `region`, which began at the mark before; nothing waits for it."""
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
    """Run every action `repeats` times in turns (A B A B ...), so that drift of the machine meets all alike.

    Args:
        actions: each marks its regions on the watch it is given.
        repeats: timed turns.
        device: whose clock counts.
        warmup: untimed turns before.
        host_ahead: on a GPU, let the host queue the whole action before the first kernel runs, so that short
            kernels are timed and not their launches.

    Returns:
        For each action the seconds of each region and of "total", one for each turn.
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
