"""Stragglers: measures how long each rank itself computes, and names the replicas that the others wait for."""

import socket
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
import torch.distributed as dist

from tide_mega.parallel.device import Device


class OwnTime:
    """A reusable stopwatch around forward and backward, where data parallelism does not communicate.

    On a GPU it records two events on the stream and reads only those already reached: it never waits, and a step's
    time may be reported with the next step. Tensor and pipeline parallelism and ZeRO-3 synchronise inside, so all
    ranks of a replica (with ZeRO-3, of the world) show the time of the slowest.
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
        """Return the seconds measured since the last call, as far as the device has reached them."""
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


@dataclass(frozen=True)
class SlowReplica:
    """A replica whose ranks compute for longer than those of the others."""

    ranks: list[int]
    hosts: list[str]
    ratio: float
    """Its computing time relative to the median replica's."""
    seconds: float
    """Its computing time per step."""

    def __str__(self) -> str:
        several = len(self.ranks) > 1
        ranks = f"rank{'s' * several} {', '.join(map(str, self.ranks))}"
        return (
            f"{ranks} on {', '.join(self.hosts)} compute{'s' * (not several)} {self.ratio:.2f} times as long as "
            f"the median ({self.seconds:.3g} s a step)"
        )


@dataclass(frozen=True)
class StragglerReport:
    """Computing time of the replicas over a window of steps."""

    slowest_ratio: float | None
    """The slowest replica's time over the median's; None with one replica or nothing measured."""
    slow: list[SlowReplica]
    """Replicas at or above the configured ratio, slowest first."""


def gather_places(replica: int) -> list[tuple[int, str]]:
    """Return (replica, host name) of every rank, in rank order; collective over the world."""
    places: list[tuple[int, str]] = [(0, "")] * dist.get_world_size()
    dist.all_gather_object(places, (replica, socket.gethostname()))
    return places


class Stragglers:
    """Sums every rank's computing time between two log lines and compares replicas.

    The ranks of a replica wait for each other (tensor and pipeline parallelism), so whole replicas are compared,
    each by its slowest rank. The lower median is used: of two replicas the faster is the reference.
    """

    def __init__(self, places: Sequence[tuple[int, str]], ratio: float) -> None:
        """Take (replica, host) by rank, and the multiple of the median from which a replica counts as slow."""
        self._hosts = [host for _, host in places]
        self._ranks: dict[int, list[int]] = {}
        for rank, (replica, _) in enumerate(places):
            self._ranks.setdefault(replica, []).append(rank)
        self._ratio = ratio
        self._seconds = [0.0] * len(places)
        self._steps = 0

    def add(self, seconds_by_rank: Sequence[float]) -> None:
        """Add a step's computing time of every rank, in seconds."""
        self._seconds = [total + new for total, new in zip(self._seconds, seconds_by_rank, strict=True)]
        self._steps += 1

    def report(self) -> StragglerReport:
        """Compare the replicas over the steps since the last report, and reset."""
        steps = max(self._steps, 1)
        by_replica = {
            replica: max(self._seconds[rank] for rank in ranks) / steps
            for replica, ranks in self._ranks.items()
        }
        self._clear()
        median = statistics.median_low(by_replica.values())
        if len(by_replica) < 2 or median <= 0:
            return StragglerReport(None, [])
        slow = [
            SlowReplica(
                ranks=self._ranks[replica],
                hosts=sorted({self._hosts[rank] for rank in self._ranks[replica]}),
                ratio=seconds / median,
                seconds=seconds,
            )
            for replica, seconds in by_replica.items()
            if seconds / median >= self._ratio
        ]
        slow.sort(key=lambda replica: -replica.ratio)
        return StragglerReport(max(by_replica.values()) / median, slow)

    def _clear(self) -> None:
        self._seconds = [0.0] * len(self._hosts)
        self._steps = 0
