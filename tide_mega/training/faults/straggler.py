"""Naming the replicas that the others wait for."""

import socket
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class SlowReplica:
    """A replica whose ranks compute longer than the others'."""

    ranks: list[int]
    hosts: list[str]
    ratio: float
    """Its own computing time over the median replica's."""
    seconds: float
    """A step's own computing time."""

    def __str__(self) -> str:
        several = len(self.ranks) > 1
        ranks = f"rank{'s' * several} {', '.join(map(str, self.ranks))}"
        return (
            f"{ranks} on {', '.join(self.hosts)} compute{'s' * (not several)} {self.ratio:.2f} times as long as "
            f"the median ({self.seconds:.3g} s a step)"
        )


@dataclass(frozen=True)
class StragglerReport:
    """Own computing time of the replicas over a window of steps."""

    slowest_ratio: float | None
    """The slowest replica's over the median's; None with one replica, or nothing measured."""
    slow: list[SlowReplica]
    """Those at or above the ratio, slowest first."""


def gather_places(replica: int) -> list[tuple[int, str]]:
    """(replica, host name) of every rank, by rank; collective over the world."""
    places: list[tuple[int, str]] = [(0, "")] * dist.get_world_size()
    dist.all_gather_object(places, (replica, socket.gethostname()))
    return places


class Stragglers:
    """Adds up every rank's own computing time between two log lines.

    The ranks of a replica wait for each other (tensor, pipeline), so replicas are compared, each by its slowest
    rank. The median is the lower of two: of two replicas the faster is the measure.
    """

    def __init__(self, places: Sequence[tuple[int, str]], ratio: float) -> None:
        """Take (replica, host) by rank, and from which multiple of the median a replica is slow."""
        self._hosts = [host for _, host in places]
        self._ranks: dict[int, list[int]] = {}
        for rank, (replica, _) in enumerate(places):
            self._ranks.setdefault(replica, []).append(rank)
        self._ratio = ratio
        self._seconds = [0.0] * len(places)
        self._steps = 0

    def add(self, seconds_by_rank: Sequence[float]) -> None:
        """Take a step's measurement of every rank."""
        self._seconds = [total + new for total, new in zip(self._seconds, seconds_by_rank, strict=True)]
        self._steps += 1

    def report(self) -> StragglerReport:
        """Compare the replicas since the last report, and begin anew."""
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
