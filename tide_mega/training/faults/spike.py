"""How unusual a loss is: a robust z-score against the last applied steps."""

import math
import statistics
from collections import deque
from collections.abc import Iterable

_NORMAL = 1.4826
"""Standard deviations in a median absolute deviation, for normal noise."""
_FLOOR = 1e-3
"""Least scale, as a part of the median: a loss that hardly varies has no spikes of a thousandth."""


class SpikeWindow:
    """The losses of the last applied steps."""

    def __init__(self, size: int, losses: Iterable[float] = ()) -> None:
        """Take how many steps to judge by, and those known so far, oldest first."""
        self._size = size
        self._losses: deque[float] = deque(losses, maxlen=size)

    @property
    def losses(self) -> list[float]:
        """What the window holds, oldest first."""
        return list(self._losses)

    def add(self, loss: float) -> None:
        """Take the loss of an applied step."""
        self._losses.append(loss)

    def z_score(self, loss: float) -> float | None:
        """(loss - median) / (1.4826 MAD), MAD being the median distance from the median; None until it is full."""
        if len(self._losses) < self._size or not math.isfinite(loss):
            return None
        median = statistics.median(self._losses)
        deviation = statistics.median(abs(known - median) for known in self._losses)
        return (loss - median) / max(_NORMAL * deviation, _FLOOR * abs(median), 1e-12)
