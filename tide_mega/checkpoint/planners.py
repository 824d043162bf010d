"""What torch.distributed.checkpoint asks of us: which boxes this rank writes, and which it wants to read."""

import contextlib
import io
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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

from tide_mega.checkpoint.errors import CheckpointError
from tide_mega.checkpoint.storage import BoxReader, BoxWriter
from tide_mega.model.canonical import Box


@dataclass(frozen=True)
class Stored:
    """A box of a stored tensor and this process's memory for it, of the box's size."""

    box: Box
    values: Tensor

    @property
    def index(self) -> MetadataIndex:
        """How torch names it."""
        return MetadataIndex(self.box.name, self.box.offset)

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """Where it lies."""
        return ChunkStorageMetadata(Size(self.box.offset), Size(self.box.size))


class _SavePlanner(DefaultSavePlanner):
    """Torch's planner, for boxes that are given instead of found in a state dictionary."""

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
    """Reads every wanted box from whichever stored boxes overlap it."""

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
    """Write every rank's boxes; collective over `group`, or by this process alone where it is None.

    Raises:
        CheckpointError: a rank could not, or the boxes of all ranks overlap or leave something out; on all alike.
    """
    with _torch_errors("could not be written"):
        dcp.save(
            {}, storage_writer=writer, planner=_SavePlanner(boxes), process_group=group, no_dist=group is None
        )


def read(boxes: list[Stored], folder: Path, group: ProcessGroup | None) -> None:
    """Fill every rank's boxes from a checkpoint; collective over `group`, or alone where it is None.

    Raises:
        CheckpointError: a tensor is not there, has another shape, or a file cannot be read; on all alike.
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
