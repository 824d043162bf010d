"""Decoders that take turns, a token each: CPU time and wall time a token, and both as ratios within a turn."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tide_mega.bench.timing import Spread

Step = Callable[[Tensor], object]
"""Takes a token for each sequence [B]."""


@dataclass
class Turns:
    """Seconds of each turn."""

    cpu: list[float] = field(default_factory=list)
    """Of all threads of the process."""
    wall: list[float] = field(default_factory=list)

    def ratio(self, base: "Turns", clock: str) -> Spread:
        """Return the spread over the turns of this one's time to the base's in the same turn."""
        pairs = zip(getattr(self, clock), getattr(base, clock), strict=True)
        return Spread.of([own / other for own, other in pairs])

    def median(self, clock: str) -> float:
        """Return the median seconds."""
        return statistics.median(getattr(self, clock))


def take_turns(
    steps: Mapping[str, Step], ids_TB: Tensor, turns: int, warmup: int, is_cuda: bool
) -> dict[str, Turns]:
    """Let every step take a token in each turn, beginning with another one each time.

    Args:
        steps: by name.
        ids_TB: tokens, as many turns' as there are, used again from the first on.
        turns: timed ones.
        warmup: turns before, whose time does not count.
        is_cuda: whether the device has to be waited for.
    """
    names = list(steps)
    found = {name: Turns() for name in names}
    for turn in range(warmup + turns):
        ids_B = ids_TB[turn % len(ids_TB)]
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            cpu, wall = time.process_time(), time.perf_counter()
            steps[name](ids_B)
            if is_cuda:
                torch.cuda.synchronize()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            if turn >= warmup:
                found[name].cpu.append(cpu)
                found[name].wall.append(wall)
    return found
