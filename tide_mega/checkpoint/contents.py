"""What this process has of a checkpoint: master weights and moments, as boxes of canonical tensors."""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from tide_mega.checkpoint.boxes import Part, parts_of
from tide_mega.checkpoint.planners import Stored
from tide_mega.checkpoint.together import gather
from tide_mega.config.schema import ModelConfig
from tide_mega.memory.deal import Deal
from tide_mega.model.canonical import TABLES, Box, local_weights
from tide_mega.parallel.engine import Engine
from tide_mega.parallel.optimizer_state import MOMENTS

KINDS = ("master", *MOMENTS)
"""What is stored of every weight; a stored tensor's name is `kind/canonical name`."""


@dataclass(frozen=True)
class Slot:
    """Fp32 memory of the optimizer, 1-D, and the boxes it holds."""

    kind: str
    memory: Tensor
    parts: tuple[Part, ...]
    is_copy: bool

    def boxes(self, values: Tensor) -> list[Stored]:
        """Give `values`, which look like the memory, their places in canonical tensors."""
        return [
            Stored(
                replace(part.box, name=f"{self.kind}/{part.box.name}"),
                values[part.start : part.start + part.numel].view(part.box.size),
            )
            for part in self.parts
        ]


class Contents:
    """Reads and writes the state of an engine and of tables owned beside it."""

    def __init__(self, engine: Engine, model: ModelConfig, group: ProcessGroup) -> None:
        """Describe them; collective over `group`, all processes on host tensors."""
        self.engine, self.model, self.group = engine, model, group
        self.owned = engine.module.owned
        self.row_shape: tuple[int, ...] = engine.module.block_shape
        owners = tuple(rank for rank, owns in enumerate(gather(group, self.owned is not None)) if owns)
        if self.owned is not None and tuple(dist.get_process_group_ranks(self.owned.group)) != owners:
            raise RuntimeError("the owners of the tables are not in the order of their ranks")
        self.deal = Deal(group, owners, model.vocab_size) if owners else None
        self._host: dict[int, Tensor] = {}

    @property
    def updates(self) -> int:
        """AdamW's count, the same for everything.

        Raises:
            RuntimeError: weights were updated different numbers of times.
        """
        count = self.engine.state.updates
        if self.owned is not None and self.owned.updates != count:
            raise RuntimeError(f"tables were updated {self.owned.updates} times and weights {count} times")
        return count

    def try_snapshot(self) -> "Snapshot":
        """Take a snapshot; what goes wrong is kept for its `check`: no rank may wait for this one for ever."""
        try:
            return self.snapshot()
        except Exception as error:
            return Snapshot([], {}, self, 0, error)

    def snapshot(self) -> "Snapshot":
        """Copy what this process stores to host memory, which the next snapshot uses again."""
        slots = [slot for slot in self._slots() if not slot.is_copy]
        kept = {} if self.owned is None else self.owned.kept()
        copies = [self._to_host(number, slot.memory) for number, slot in enumerate(slots)]
        rows = {kind: self._to_host(len(slots) + k, kept[kind]) for k, kind in enumerate(kept)}
        if any(slot.memory.is_cuda for slot in slots) or any(t.is_cuda for t in kept.values()):
            torch.cuda.current_stream().synchronize()
        boxes = [stored for slot, copy in zip(slots, copies, strict=True) for stored in slot.boxes(copy)]
        return Snapshot(boxes, rows, self, self.updates)

    def wanted(self) -> tuple[list[Stored], list[tuple[Slot, Tensor]], dict[str, Tensor]]:
        """Return boxes to read, the slots with the host memory they fill, and the ranges of table rows by kind."""
        slots = [(slot, torch.empty_like(slot.memory, device="cpu")) for slot in self._slots()]
        boxes = [stored for slot, host in slots for stored in slot.boxes(host)]
        ranges: dict[str, Tensor] = {}
        if self.deal is not None:
            for kind in KINDS:
                box = self._row_box(kind)
                ranges[kind] = torch.empty(box.size)
                boxes += [Stored(box, ranges[kind])] if box.size[0] else []
        return boxes, slots, ranges

    def take(self, slots: list[tuple[Slot, Tensor]], ranges: dict[str, Tensor], updates: int) -> None:
        """Continue from what was read; collective."""
        for slot, host in slots:
            slot.memory.copy_(host)
        if self.deal is not None:
            kept = {} if self.owned is None else self.owned.kept()
            for kind in KINDS:
                rows_WKD = self.deal.from_range(ranges[kind], self.row_shape)
                if kept:
                    kept[kind][: len(rows_WKD)].copy_(rows_WKD)
        self.engine.state.updates = updates
        if self.owned is not None:
            self.owned.updates = updates
        self.engine.state.publish()

    def _slots(self) -> list[Slot]:
        state, slots = self.engine.state, []
        for weight in local_weights(self.engine.module, self.model):
            kept = state.kept(weight.tensor)  # type: ignore[arg-type]
            if kept is None or not weight.boxes:
                continue
            parts = tuple(parts_of(weight, kept.start, kept.start + kept.master.numel()))
            slots += [Slot(kind, getattr(kept, kind), parts, weight.is_copy) for kind in KINDS]
        return slots

    def _row_box(self, kind: str) -> Box:
        """The contiguous table rows that this process reads and writes; none where it owns none."""
        assert self.deal is not None
        first, last = (0, 0) if self.deal.owner is None else self.deal.range_of(self.deal.owner)
        shape, corner = (self.model.vocab_size, *self.row_shape), (0,) * len(self.row_shape)
        return Box(f"{kind}/{TABLES}", shape, (first, *corner), (last - first, *self.row_shape))

    def _to_host(self, number: int, memory: Tensor) -> Tensor:
        host = self._host.get(number)
        if host is None or host.shape != memory.shape:
            host = torch.empty(memory.shape, dtype=memory.dtype, pin_memory=memory.is_cuda)
            self._host[number] = host
        return host.copy_(memory, non_blocking=True)


@dataclass(frozen=True)
class Snapshot:
    """A process's part of the state at one instant, in host memory."""

    weights: list[Stored]
    rows: dict[str, Tensor]
    """Owned table rows [W, K, D] by kind, as dealt out; empty where none are owned here."""
    contents: Contents
    updates: int
    error: Exception | None = None

    def check(self) -> None:
        """Raise what went wrong while it was taken."""
        if self.error is not None:
            raise self.error

    def boxes(self) -> list[Stored]:
        """Return everything this process writes; collective where tables have owners."""
        contents, boxes = self.contents, list(self.weights)
        if contents.deal is not None:
            for kind in KINDS:
                values_RKD = contents.deal.to_range(self.rows.get(kind), contents.row_shape)
                if len(values_RKD):
                    boxes.append(Stored(contents._row_box(kind), values_RKD))
        return boxes
