"""Bytes that the memory moves in an optimizer step and bytes it occupies: a meter for running code, and formulas.

One convention for all: bytes of one rank in one optimizer step, sent and received counted separately, each byte
once where it leaves and once where it arrives. A ring over m ranks sends (and receives) (m - 1) / m of a tensor
for a reduce-scatter or an all-gather and twice that for an all-reduce; a broadcast leaves its root once.
`TrafficMeter` counts this way in a run, and the formulas compute the same without measuring.

Symbols of the formulas: V rows of a table, K blocks, d width, U distinct token types that a replica meets in a
step, N tokens of a micro-batch; t tensor-parallel, D data-parallel, p pipeline size; n = t D owners. R = U K d,
the elements of the rows fetched; P = V K d, those of all tables.
"""

from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor


class TrafficMeter:
    """Bytes that this process sent and received since the last reading, by kind.

    Collectives count what their algorithm must move: a ring over n members sends (and receives) 2 (n - 1) / n of a
    tensor for an all-reduce, (n - 1) / n for an all-gather; a broadcast sends it once from the root.
    """

    def __init__(self) -> None:
        self._sent: dict[str, int] = {}
        self._received: dict[str, int] = {}

    def add(self, kind: str, sent: float, received: float) -> None:
        """Add bytes of a kind."""
        self._sent[kind] = self._sent.get(kind, 0) + round(sent)
        self._received[kind] = self._received.get(kind, 0) + round(received)

    def add_sum(self, kind: str, tensor: Tensor, members: int) -> None:
        """Count an all-reduce of `tensor` over `members` processes."""
        moved = 2 * size(tensor) * (members - 1) / members
        self.add(kind, moved, moved)

    def add_gather(self, kind: str, whole: Tensor, members: int) -> None:
        """Count an all-gather of `whole` from equal parts."""
        moved = size(whole) * (members - 1) / members
        self.add(kind, moved, moved)

    def add_broadcast(self, kind: str, tensor: Tensor, members: int, *, is_root: bool) -> None:
        """Count a broadcast of `tensor` from one of `members` processes."""
        if members > 1:
            self.add(kind, size(tensor) if is_root else 0, 0 if is_root else size(tensor))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count what moves within the block."""
        sent, received = self._sent.copy(), self._received.copy()
        try:
            yield
        finally:
            self._sent, self._received = sent, received

    def read(self) -> dict[str, dict[str, int]]:
        """Return {kind: {"sent", "received"}} and reset the counts."""
        kinds = sorted(self._sent)
        reading = {k: {"sent": self._sent[k], "received": self._received[k]} for k in kinds}
        self._sent.clear()
        self._received.clear()
        return reading


def size(tensor: Tensor) -> int:
    """Return the bytes of a tensor."""
    return tensor.numel() * tensor.element_size()


GIGA = 10**9
IN_REPLICA = frozenset({"tensor rows", "sequence sum", "stage rows", "stage sum"})
"""Kinds of traffic within one replica, among its tensor ranks or stages."""


@dataclass(frozen=True)
class Tables:
    """The size of the memory's tables."""

    vocab: int
    """V."""
    blocks: int
    """K."""
    width: int
    """d."""

    @property
    def row(self) -> int:
        """Elements of a token type's row over all blocks, K d."""
        return self.blocks * self.width


@dataclass(frozen=True)
class Layout:
    """The parallel sizes over which the tables are spread."""

    tensor: int = 1
    data: int = 1
    pipeline: int = 1
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        for name in ("tensor", "data", "pipeline"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def owners(self) -> int:
        """n = t D: ranks over which rows are divided if each has one owner."""
        return self.tensor * self.data


@dataclass(frozen=True)
class Widths:
    """Bytes per element, of what is moved and of what is kept."""

    row: int = 2
    """Weights, fetched rows and normalised rows."""
    gradient: int = 2
    """Gradients sent to owners, or through the data-parallel reduction."""
    partial: int = 4
    """Gradients of rows while layers, stages and parts of a sequence add to them."""
    read: int = 4
    """Normalised rows as the layers read them."""
    id: int = 8
    """A token id in a request."""
    state: int = 4
    """Master weights, each of Adam's two moments, and the gradients that an owner accumulates."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of one rank in one optimizer step, by kind."""

    sent: dict[str, float] = field(default_factory=dict)
    received: dict[str, float] = field(default_factory=dict)

    @property
    def total_sent(self) -> float:
        """Bytes sent by the rank."""
        return sum(self.sent.values())

    @property
    def total_received(self) -> float:
        """Bytes received by the rank."""
        return sum(self.received.values())

    def inside(self) -> "Traffic":
        """Return the traffic within a replica."""
        return self._only(IN_REPLICA & (self.sent.keys() | self.received.keys()))

    def between(self) -> "Traffic":
        """Return the traffic among all owners or all replicas."""
        return self._only((self.sent.keys() | self.received.keys()) - IN_REPLICA)

    def _only(self, kinds: Set[str]) -> "Traffic":
        return Traffic(*({k: v for k, v in way.items() if k in kinds} for way in (self.sent, self.received)))

    @property
    def each_way(self) -> float:
        """Return the mean of bytes sent and received."""
        return (self.total_sent + self.total_received) / 2

    @property
    def waited_for(self) -> float:
        """Return the bytes that a full-duplex link waits for: kinds in turn, each in its busier direction."""
        kinds = dict.fromkeys([*self.sent, *self.received])
        return sum(max(self.sent.get(kind, 0.0), self.received.get(kind, 0.0)) for kind in kinds)

    def seconds(self, gigabits: float) -> float:
        """Return the seconds on a link of `gigabits` 10^9 bit/s each way, at full rate, no latency, no overlap."""
        if gigabits <= 0:
            raise ValueError(f"gigabits={gigabits} must be positive")
        return self.waited_for * 8 / (gigabits * GIGA)


def dense_sync(tables: Tables, layout: Layout, widths: Widths | None = None) -> Traffic:
    """Return the traffic of data-parallel synchronisation of tables replicated over D and sharded over t (ZeRO-1).

    Reduce-scatter of the gradient and all-gather of the weights, each direction:
    (D - 1) / D x P / t x (gradient bytes + row bytes). Independent of the tokens. The traffic of tensor-parallel
    lookups is left out, in favour of this approach.
    """
    widths = widths or Widths()
    elements = away(layout.data) * tables.vocab * tables.row / layout.tensor
    both = {"table gradients": elements * widths.gradient, "table weights": elements * widths.row}
    return Traffic(both, dict(both))


def exchange(
    tables: Tables, layout: Layout, distinct: float, widths: Widths | None = None, *, skew: float = 1.0
) -> Traffic:
    """Return the traffic of one exchange per step with rows owned by one rank each; for a rank of the first stage.

    With s = skew x (n - 1) / n, where (n - 1) / n of the rows asked for are on other ranks:

    - ids: a replica's U ids are asked for in t parts, U / t x (n - 1) / n x id bytes
    - rows: a rank receives U / t x (n - 1) / n rows of K d x row bytes, and as owner sends s U / t of them
    - row gradients, the same way back: sends U / t x (n - 1) / n, receives s U / t, of K d x gradient bytes
    - tensor rows: the t parts of the replica are all-gathered, (t - 1) / t x R x row bytes
    - sequence sum: with sequence parallelism a tensor rank has the gradient of its own tokens alone;
      2 (t - 1) / t x R x partial bytes
    - stage rows: one broadcast over the pipeline, which the first stage sends, R x row bytes
    - stage sum: the stages' gradients, 2 (p - 1) / p x R x partial bytes

    Other stages have only the last two, and receive the broadcast. Left out, as less than a thousandth: the row
    counts sent to each owner, and the token ids of micro-batches.

    Args:
        tables: V, K, d.
        layout: t, D, p and sequence parallelism.
        distinct: U of one replica; a mean over replicas gives mean bytes.
        widths: bytes of an element.
        skew: rows asked of this rank as owner, relative to the mean owner: 1 where rows are spread evenly.

    Raises:
        ValueError: `distinct` or `skew` out of range.
    """
    widths = widths or Widths()
    _check_distinct(tables, distinct)
    if not 0 <= skew <= layout.owners:
        raise ValueError(f"skew={skew} is not within 0 to the {layout.owners} owners")
    asked = distinct / layout.tensor * away(layout.owners)
    served = asked * skew
    row, gradient = tables.row * widths.row, tables.row * widths.gradient
    sent = {"ids": asked * widths.id, "rows": served * row, "row gradients": asked * gradient}
    received = {"ids": served * widths.id, "rows": asked * row, "row gradients": served * gradient}
    fetched = distinct * tables.row
    if layout.tensor > 1:
        sent["tensor rows"] = received["tensor rows"] = away(layout.tensor) * fetched * widths.row
        if layout.sequence_parallel:
            summed = 2 * away(layout.tensor) * fetched * widths.partial
            sent["sequence sum"] = received["sequence sum"] = summed
    if layout.pipeline > 1:
        sent["stage rows"] = fetched * widths.row
        summed = 2 * away(layout.pipeline) * fetched * widths.partial
        sent["stage sum"] = received["stage sum"] = summed
    return Traffic(sent, received)


def plain_memory(
    tables: Tables,
    layout: Layout,
    microbatch_tokens: int,
    widths: Widths | None = None,
    *,
    in_flight: int = 1,
) -> dict[str, float]:
    """Return the bytes that a rank holds, by kind: tables replicated over D (ZeRO-1), M materialised per token.

    - weights P / t x row bytes, gradients P / t x gradient bytes
    - master weights and two moments, sharded over D: 3 P / (t D) x state bytes
    - M [N, K, d] and its gradient, N K d x (row + gradient bytes); M once for each micro-batch in flight

    Left out, in favour of this approach: M before its norm, temporaries of each layer, and a second dense gradient
    during accumulation.
    """
    widths = widths or Widths()
    held = tables.vocab * tables.row / layout.tensor
    looked_up = microbatch_tokens * tables.row
    return {
        "weights": held * widths.row,
        "gradients": held * widths.gradient,
        "optimizer state": 3 * held / layout.data * widths.state,
        "M": in_flight * looked_up * widths.row,
        "gradient of M": looked_up * widths.gradient,
    }


def owner_memory(
    tables: Tables, layout: Layout, distinct: float, widths: Widths | None = None
) -> dict[str, float]:
    """Return the bytes that a rank holds, by kind: rows owned by one rank each, the step's distinct rows fetched.

    - own rows ceil(V / n) K d x state bytes for the weights (rounded to 16 bits as they are served), as many
      for their gradients, twice as many for Adam's moments
    - rows: as fetched (the norm's backward needs them) and normalised, 2 R x row bytes; as the layers read
      them, R x read bytes
    - gradient of rows: R x partial bytes, and on its way through the norm to the owners 2 R x gradient bytes

    For a rank of the first stage, where the owners are; other stages hold only the last two. Left out, like the
    buffers of the dense reduction in `plain_memory`: send and receive buffers.
    """
    widths = widths or Widths()
    _check_distinct(tables, distinct)
    own = -(-tables.vocab // layout.owners) * tables.row
    fetched = distinct * tables.row
    return {
        "weights": own * widths.state,
        "gradients": own * widths.state,
        "optimizer state": 2 * own * widths.state,
        "rows": fetched * (2 * widths.row + widths.read),
        "gradient of rows": fetched * (widths.partial + 2 * widths.gradient),
    }


def away(ranks: int) -> float:
    """Return the share of evenly spread data that lies on other ranks."""
    return (ranks - 1) / ranks


def _check_distinct(tables: Tables, distinct: float) -> None:
    if not 0 <= distinct <= tables.vocab:
        raise ValueError(f"distinct={distinct} is not within 0 to the {tables.vocab} rows of the tables")
