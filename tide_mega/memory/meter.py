"""Counting what leaves and reaches this process."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


class TrafficMeter:
    """Bytes this process sent to and received from others, by kind, since the last reading.

    Collectives are counted by what the algorithm must move: a ring over n members sends (and receives)
    2 (n - 1) / n of a tensor for a sum, (n - 1) / n for a gather; a broadcast sends it once from the root.
    """

    def __init__(self) -> None:
        self._sent: dict[str, int] = {}
        self._received: dict[str, int] = {}

    def add(self, kind: str, sent: float, received: float) -> None:
        """Count bytes of a kind."""
        self._sent[kind] = self._sent.get(kind, 0) + round(sent)
        self._received[kind] = self._received.get(kind, 0) + round(received)

    def add_sum(self, kind: str, tensor: Tensor, members: int) -> None:
        """Count a sum of `tensor` over `members` processes."""
        moved = 2 * size(tensor) * (members - 1) / members
        self.add(kind, moved, moved)

    def add_gather(self, kind: str, whole: Tensor, members: int) -> None:
        """Count the gathering of `whole` from equal parts."""
        moved = size(whole) * (members - 1) / members
        self.add(kind, moved, moved)

    def add_broadcast(self, kind: str, tensor: Tensor, members: int, *, is_root: bool) -> None:
        """Count a broadcast of `tensor` from one of `members` processes."""
        if members > 1:
            self.add(kind, size(tensor) if is_root else 0, 0 if is_root else size(tensor))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What moves in the block is not counted."""
        sent, received = self._sent.copy(), self._received.copy()
        try:
            yield
        finally:
            self._sent, self._received = sent, received

    def read(self) -> dict[str, dict[str, int]]:
        """Return {kind: {"sent", "received"}} and start from zero."""
        kinds = sorted(self._sent)
        reading = {k: {"sent": self._sent[k], "received": self._received[k]} for k in kinds}
        self._sent.clear()
        self._received.clear()
        return reading


def size(tensor: Tensor) -> int:
    """Bytes of a tensor."""
    return tensor.numel() * tensor.element_size()
