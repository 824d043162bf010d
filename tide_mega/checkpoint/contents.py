"""What this process holds of a checkpoint, as boxes of canonical tensors, and the plans to write and read them.

- A range of a flattened weight (a ZeRO partition) is cut into boxes of canonical tensors, which any other
  topology can read (`parts_of`, `boxes_of_range`).
- `write` and `read` plan for torch.distributed.checkpoint which boxes this rank writes and which it reads.
- `Contents` maps master weights, AdamW moments and owned table rows to boxes; `Snapshot` is its copy in host
  memory.

Dimensions: W table rows owned here, K memory blocks, D width.
"""

import contextlib
import io
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Size, Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import DefaultSavePlanner, LoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from tide_mega.checkpoint.agreement import gather
from tide_mega.checkpoint.storage import BoxReader, BoxWriter
from tide_mega.config.schema import ModelConfig
from tide_mega.errors import CheckpointError
from tide_mega.memory.ownership import OwnershipExchange
from tide_mega.model.canonical import TABLES, Box, LocalWeight, local_weights
from tide_mega.parallel.engine import Engine
from tide_mega.parallel.optimizer_state import MOMENTS


@dataclass(frozen=True)
class Part:
    """A box, and the offset of its elements in the range it was cut from."""

    box: Box
    start: int

    @property
    def numel(self) -> int:
        """Number of elements, which are contiguous."""
        return math.prod(self.box.size)


def parts_of(weight: LocalWeight, first: int, last: int) -> Iterator[Part]:
    """Cut elements first..last of a flattened weight into boxes of canonical tensors."""
    start = 0
    for box in weight.boxes:
        end = start + math.prod(box.size)
        low, high = max(start, first), min(end, last)
        if low < high:
            for offset, size in boxes_of_range(box.size, low - start, high - start):
                at = start + _flat(offset, box.size) - first
                place = tuple(a + b for a, b in zip(box.offset, offset, strict=True))
                yield Part(Box(box.name, box.shape, place, size), at)
        start = end


def boxes_of_range(
    shape: tuple[int, ...], first: int, last: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut elements first..last of a row-major array into the fewest boxes (offset, size), in order."""
    if first >= last:
        return
    inner = math.prod(shape[1:])
    if inner == 1 and len(shape) == 1:
        yield (first,), (last - first,)
        return
    row, last_row = first // inner, last // inner
    if first % inner:  # the remainder of a row
        end = min(last, (row + 1) * inner)
        for offset, size in boxes_of_range(shape[1:], first % inner, end - row * inner):
            yield (row, *offset), (1, *size)
        row += 1
    if row < last_row:
        yield (row, *(0,) * (len(shape) - 1)), (last_row - row, *shape[1:])
    if last % inner and row <= last_row:  # the beginning of a row
        for offset, size in boxes_of_range(shape[1:], 0, last % inner):
            yield (last_row, *offset), (1, *size)


def _flat(offset: tuple[int, ...], shape: tuple[int, ...]) -> int:
    position = 0
    for at, length in zip(offset, shape, strict=True):
        position = position * length + at
    return position


@dataclass(frozen=True)
class Stored:
    """A box of a stored tensor, and this process's memory for it, of the same size."""

    box: Box
    values: Tensor

    @property
    def index(self) -> MetadataIndex:
        """The box's key in torch.distributed.checkpoint."""
        return MetadataIndex(self.box.name, self.box.offset)

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """The box's offset and size."""
        return ChunkStorageMetadata(Size(self.box.offset), Size(self.box.size))


class _SavePlanner(DefaultSavePlanner):
    """torch's planner for given boxes, instead of those found in a state dictionary."""

    def __init__(self, boxes: list[Stored]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._boxes = {stored.index: stored for stored in boxes}

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([self._item(stored) for stored in self._boxes.values()])
        return self.plan

    def _item(self, stored: Stored) -> WriteItem:
        properties = TensorProperties.create_from_tensor(stored.values)
        data = TensorWriteData(stored.chunk, properties, Size(stored.box.shape))
        return WriteItem(stored.index, WriteItemType.SHARD, tensor_data=data)

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        return self._boxes[write_item.index].values


@dataclass
class _LoadPlanner(LoadPlanner):
    """Reads every wanted box from all stored boxes that overlap it."""

    wanted: list[Stored]
    metadata: Metadata | None = None
    _targets: dict[MetadataIndex, Tensor] = field(default_factory=dict)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for stored in self.wanted:
            box = stored.box
            saved = self.metadata.state_dict_metadata.get(box.name)
            if not isinstance(saved, TensorStorageMetadata) or tuple(saved.size) != box.shape:
                found = "nothing" if saved is None else f"{tuple(getattr(saved, 'size', ()))}"
                raise CheckpointError(f"{box.name} should be there with shape {box.shape}; there is {found}")
            of_box = create_read_items_for_chunk_list(box.name, saved, [stored.chunk])
            if sum(math.prod(item.lengths) for item in of_box) != math.prod(box.size):
                raise CheckpointError(f"{box.name} has gaps within {box.size} from {box.offset} on")
            self._targets[stored.index] = stored.values
            items += of_box
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise CheckpointError(f"{read_item.storage_index.fqn} is not a tensor")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        target = self._targets[MetadataIndex(read_item.dest_index.fqn, read_item.dest_index.offset)]
        for dimension, (first, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            target = target.narrow(dimension, first, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


def write(boxes: list[Stored], writer: BoxWriter, group: ProcessGroup | None) -> None:
    """Write every rank's boxes; collective over `group`, or by this process alone if it is None.

    Raises:
        CheckpointError: a rank failed, or the boxes of all ranks overlap or leave gaps; raised on all ranks.
    """
    with _torch_errors("could not be written"):
        dcp.save(
            {}, storage_writer=writer, planner=_SavePlanner(boxes), process_group=group, no_dist=group is None
        )


def read(boxes: list[Stored], folder: Path, group: ProcessGroup | None) -> None:
    """Fill every rank's boxes from a checkpoint; collective over `group`, or by this process alone if it is None.

    Raises:
        CheckpointError: a tensor is missing or has another shape, or a file cannot be read; raised on all ranks.
    """
    planner = _LoadPlanner(boxes)
    with _torch_errors(f"{folder} could not be read"):
        dcp.load(
            {}, storage_reader=BoxReader(folder), planner=planner, process_group=group, no_dist=group is None
        )


@contextlib.contextmanager
def _torch_errors(what: str) -> Iterator[None]:
    """Turn torch's collected failures into one sentence."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except dcp.CheckpointException as error:
        by_text: dict[str, list[str]] = {}
        for rank, (failure, _) in sorted(error.failures.items()):
            by_text.setdefault(f"{type(failure).__name__}: {failure}", []).append(str(rank))
        said = "; ".join(f"rank {', '.join(ranks)}: {text}" for text, ranks in by_text.items())
        raise CheckpointError(f"{what} ({said})") from error


KINDS = ("master", *MOMENTS)
"""Kinds of values stored for every weight; a stored tensor is named `kind/canonical name`."""


@dataclass(frozen=True)
class Slot:
    """A 1-D range of the optimizer's fp32 memory, and the boxes that it holds."""

    kind: str
    memory: Tensor
    parts: tuple[Part, ...]
    is_copy: bool

    def boxes(self, values: Tensor) -> list[Stored]:
        """Return `values`, laid out like the memory, as boxes of canonical tensors."""
        return [
            Stored(
                replace(part.box, name=f"{self.kind}/{part.box.name}"),
                values[part.start : part.start + part.numel].view(part.box.size),
            )
            for part in self.parts
        ]


class Contents:
    """Reads and writes the state of an engine and of tables owned outside the model."""

    def __init__(self, engine: Engine, model: ModelConfig, group: ProcessGroup) -> None:
        """Describe the state; collective over `group`, all processes, for host tensors."""
        self.engine, self.model, self.group = engine, model, group
        self.owned = engine.module.memory.owned
        self.row_shape: tuple[int, ...] = engine.module.memory.block_shape
        owners = tuple(rank for rank, owns in enumerate(gather(group, self.owned is not None)) if owns)
        if self.owned is not None and tuple(dist.get_process_group_ranks(self.owned.group)) != owners:
            raise RuntimeError("the owners of the tables are not in the order of their ranks")
        self.deal = OwnershipExchange(group, owners, model.vocab_size) if owners else None
        self._host: dict[int, Tensor] = {}

    @property
    def updates(self) -> int:
        """AdamW's update count, the same for all weights.

        Raises:
            RuntimeError: weights were updated different numbers of times.
        """
        count = self.engine.state.updates
        if self.owned is not None and self.owned.updates != count:
            raise RuntimeError(f"tables were updated {self.owned.updates} times and weights {count} times")
        return count

    def try_snapshot(self) -> "Snapshot":
        """Take a snapshot; errors are kept for its `check`, so that no rank waits for this one in vain."""
        try:
            return self.snapshot()
        except Exception as error:
            return Snapshot([], {}, self, 0, error)

    def snapshot(self) -> "Snapshot":
        """Copy what this process stores to host memory, which the next snapshot reuses."""
        slots = [slot for slot in self._slots() if not slot.is_copy]
        kept = {} if self.owned is None else self.owned.kept()
        copies = [self._to_host(number, slot.memory) for number, slot in enumerate(slots)]
        rows = {kind: self._to_host(len(slots) + k, kept[kind]) for k, kind in enumerate(kept)}
        if any(slot.memory.is_cuda for slot in slots) or any(t.is_cuda for t in kept.values()):
            torch.cuda.current_stream().synchronize()
        boxes = [stored for slot, copy in zip(slots, copies, strict=True) for stored in slot.boxes(copy)]
        return Snapshot(boxes, rows, self, self.updates)

    def wanted(self) -> tuple[list[Stored], list[tuple[Slot, Tensor]], dict[str, Tensor]]:
        """Return the boxes to read, the slots with the host memory they fill, and ranges of table rows by kind."""
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
        """Load what was read into the optimizer and the tables; collective."""
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
        """Return the contiguous table rows that this process reads and writes; none if it owns none."""
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
    """A process's part of the state at one instant, copied to host memory."""

    weights: list[Stored]
    rows: dict[str, Tensor]
    """Owned table rows [W, K, D] by kind, in cyclic order; empty if none are owned here."""
    contents: Contents
    updates: int
    error: Exception | None = None

    def check(self) -> None:
        """Raise the error that occurred while it was taken, if any."""
        if self.error is not None:
            raise self.error

    def boxes(self) -> list[Stored]:
        """Return all boxes that this process writes; collective if tables have owners."""
        contents, boxes = self.contents, list(self.weights)
        if contents.deal is not None:
            for kind in KINDS:
                values_RKD = contents.deal.to_range(self.rows.get(kind), contents.row_shape)
                if len(values_RKD):
                    boxes.append(Stored(contents._row_box(kind), values_RKD))
        return boxes
