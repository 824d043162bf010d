"""Accounts of a dry run: memory by kind over time, arithmetic and memory traffic of kernels, and collectives.

A storage is held from its first use until it is freed, rounded up to 512 bytes as CUDA's allocator does. Its kind
follows from the code that made it (`KINDS`), or from what it has become (`Ledger.name`). Operations are kept as a
histogram: an estimate of their time needs the rates of a device, which a dry run does not have.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry

GRANULE = 512
"""Bytes to which CUDA's caching allocator rounds up."""
KINDS = (
    ("tide_mega/kernels/vocab_loss/", "logits"),
    ("tide_mega/memory/exchange.py", "exchange"),
    ("tide_mega/memory/owned.py", "exchange"),
    ("tide_mega/memory/plan.py", "exchange"),
    ("tide_mega/memory/memory.py", "rows"),
    ("tide_mega/kernels/row_norm/", "rows"),
    ("tide_mega/kernels/row_gradient/", "rows"),
    ("tide_mega/parallel/accumulation.py", "gradients"),
    ("tide_mega/parallel/engine.py", "buckets"),
    ("deepspeed/", "buckets"),
    ("torch/optim/", "update"),
    ("tide_mega/", "activations"),
    ("megatron/", "activations"),
)
"""What storages made in a file are, by the first prefix of the place that fits."""
INDEXED = frozenset(
    {"index", "index_select", "gather", "embedding", "scatter", "scatter_", "scatter_add_", "_unsafe_index"}
    | {"index_put", "index_put_", "_index_put_impl_", "index_fill_", "index_copy_", "index_add_"}
)
"""Operations that read or write only some rows of their first tensor."""
PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
"""Matrix products, with the place of the left factor among their arguments."""
FREE = frozenset(
    {"detach", "alias", "empty", "empty_like", "new_empty", "empty_strided", "lift_fresh", "set_"}
)
"""Operations that launch no kernel, beside views."""
READ, FORWARD, BACKWARD, RETURN, REDUCE, UPDATE = "read", "forward", "backward", "return", "reduce", "update"
PHASES = ("build", READ, FORWARD, BACKWARD, RETURN, REDUCE, UPDATE)
"""Of a step: the memory is read; micro-batches run; row gradients go back; data parallelism reduces; AdamW."""


@dataclass(frozen=True)
class Work:
    """One size of operation."""

    phase: str
    name: str
    flops: int
    bytes: int
    """Read and written."""
    smallest: int
    """The smallest dimension of a matrix product, the size of a head of attention; 0 for other operations."""
    width: int
    """Bytes of an element of a matrix product's operands."""


@dataclass(frozen=True)
class Message:
    """One kind of collective."""

    phase: str
    name: str
    """c10d's name."""
    place: str
    group: tuple[int, ...]
    """Ranks of its members, ascending."""


@dataclass
class Moved:
    """How often and how much a kind of collective moves."""

    count: int = 0
    bytes: int = 0
    """Of the whole tensor: gathered, to be scattered, or sent to all."""


@dataclass
class _Held:
    bytes: int
    kind: str
    line: str


@dataclass(frozen=True)
class Instant:
    """Memory at one time."""

    phase: str
    by_kind: dict[str, int]

    @property
    def bytes(self) -> int:
        """All kinds."""
        return sum(self.by_kind.values())


@dataclass
class Peak:
    """The fullest instant of a phase."""

    bytes: int = 0
    by_kind: dict[str, int] = field(default_factory=dict)
    by_line: dict[str, int] = field(default_factory=dict)
    """Bytes by the line of code that made them, the most first; of an instant within 1 % of the peak."""


class Ledger:
    """The accounts of one process; `clear` resets all but what is held."""

    def __init__(self, kind: str) -> None:
        """Count the tensors of a kind of device: cuda or cpu."""
        self._device = kind
        self._held: dict[int, _Held] = {}
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._now: Counter[str] = Counter()
        self._bytes = 0
        self._base = "build"
        self._fused = 0
        self.clear()

    def clear(self) -> None:
        """Forget all but what is held."""
        self.work: Counter[Work] = Counter()
        self.launches: Counter[str] = Counter()
        self.messages: dict[Message, Moved] = {}
        self.peaks: dict[str, Peak] = {}
        self.instants: list[Instant] = []
        self._lines_at: dict[str, int] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Account what happens within to a phase; `FORWARD` means forward and backward, told apart by autograd."""
        before, self._base = self._base, name
        try:
            yield
        finally:
            self._base = before

    def enter(self, name: str) -> None:
        """Account what happens from here on to a phase."""
        self._base = name

    def phase_at(self, place: str) -> str:
        """Return the phase of what a place does now."""
        if self._base == FORWARD and torch._C._current_graph_task_id() != -1:
            return BACKWARD
        if self._base == RETURN and place.startswith(("deepspeed/", "tide_mega/parallel/accumulation.py")):
            return REDUCE
        return self._base

    def counts(self, tensor: Any) -> bool:
        """Return whether a value is a tensor of the device that is counted."""
        return isinstance(tensor, Tensor) and tensor.device.type == self._device

    def hold(self, tensors: Iterable[Tensor], place: str, line: str) -> None:
        """Account storages that are not known yet; one kernel's intermediate results are nowhere in memory."""
        if self._fused:
            return
        for tensor in tensors:
            if not self.counts(tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._held:
                continue
            size = -(-storage.nbytes() // GRANULE) * GRANULE
            kind = next((kind for prefix, kind in KINDS if place.startswith(prefix)), "other")
            self._held[key] = _Held(size, kind, line)
            self._alive[key] = weakref.ref(storage, partial(self._drop, key))
            self._change(kind, size, self.phase_at(place))

    def name(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Say what storages are."""
        for tensor in tensors:
            held = self._held.get(tensor.untyped_storage()._cdata)
            if held is not None:
                self._now[held.kind] -= held.bytes
                self._now[kind] += held.bytes
                held.kind = kind

    def _drop(self, key: int, _: object) -> None:
        held = self._held.pop(key, None)
        self._alive.pop(key, None)
        if held is not None:
            self._now[held.kind] -= held.bytes
            self._bytes -= held.bytes

    def _change(self, kind: str, size: int, phase: str) -> None:
        self._now[kind] += size
        self._bytes += size
        peak = self.peaks.setdefault(phase, Peak())
        if self._bytes > peak.bytes:
            peak.bytes = self._bytes
            peak.by_kind = self.by_kind()
            if self._bytes > 1.01 * self._lines_at.get(phase, 0):
                self._lines_at[phase] = self._bytes
                lines: Counter[str] = Counter()
                for held in self._held.values():
                    lines[f"{held.kind}: {held.line}"] += held.bytes
                peak.by_line = dict(lines.most_common(12))
        last = self.instants[-1] if self.instants else None
        if last is None or abs(self._bytes - last.bytes) > 0.01 * max(self._bytes, last.bytes):
            self.instants.append(Instant(phase, self.by_kind()))

    def by_kind(self) -> dict[str, int]:
        """Return the bytes held now, by kind."""
        return {kind: size for kind, size in self._now.items() if size}

    @contextmanager
    def fused(self, name: str, inputs: Iterable[Any], place: str, line: str) -> Iterator[list[Any]]:
        """Count the operations within as one kernel that reads its inputs once; append its outputs to the list."""
        self._fused += 1
        outputs: list[Any] = []
        try:
            yield outputs
        finally:
            self._fused -= 1
            if not self._fused:
                self._add(self.phase_at(place), name, 0, [*inputs, *outputs])
                self.hold(filter(self.counts, outputs), place, line)

    def operation(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        inputs: list[Tensor],
        result: Any,
        place: str,
    ) -> None:
        """Account one operation of torch."""
        name = func._opname
        outputs = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
        if func.is_view or name in FREE or func.namespace == "prim" or self._fused:
            return
        if not any(map(self.counts, (*inputs, *outputs))):
            return
        flops = smallest = width = 0
        if name in PRODUCTS:
            left, right = args[PRODUCTS[name] :][:2]
            flops = 2 * left.numel() * right.size(-1)
            smallest, width = min(*left.shape[-2:], right.size(-1)), left.element_size()
        elif "attention" in name and (formula := flop_registry.get(func._overloadpacket)) is not None:
            flops = int(formula(*args, **kwargs, out_val=result)) // (1 + _is_causal(func, args, kwargs))
            smallest, width = args[0].size(-1), args[0].element_size()
        moved = [*inputs, *outputs]
        if name in INDEXED:  # of the table only the rows that are named
            moved = [*inputs[1:], *(inputs[1:] if func._schema.is_mutable else [*outputs, *outputs])]
        elif func._schema.is_mutable and not outputs:
            moved = [*inputs, *inputs[:1]]
        self._add(self.phase_at(place), name, flops, moved, smallest, width)

    def launch(self, name: str, arguments: Iterable[Any], place: str) -> None:
        """Account one launch of a Triton kernel, which reads or writes each of its tensors once."""
        self._add(self.phase_at(place), name, 0, list(arguments))

    def _add(
        self, phase: str, name: str, flops: int, moved: list[Any], smallest: int = 0, width: int = 0
    ) -> None:
        size = sum(t.numel() * t.element_size() for t in moved if self.counts(t))
        self.work[Work(phase, name, flops, size, smallest, width)] += 1
        self.launches[phase] += 1

    def message(self, name: str, tensors: list[Tensor], group: tuple[int, ...], place: str) -> None:
        """Account one collective of the whole `tensors`."""
        key = Message(self.phase_at(place), name, place, group)
        moved = self.messages.setdefault(key, Moved())
        moved.count += 1
        moved.bytes += sum(t.numel() * t.element_size() for t in tensors)


def _is_causal(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    by_name = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
    return bool(by_name.get("is_causal", False))
