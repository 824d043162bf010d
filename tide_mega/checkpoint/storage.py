"""torch.distributed.checkpoint's storage in safetensors files that hold any number of boxes of a tensor.

torch plans, validates (no overlap, nothing left out) and cuts what is read; here are the files. Its own
safetensors storage names an entry by its tensor alone, so a rank could keep one box of each; ZeRO's ranges begin
and end within rows and are several. The index is JSON: nothing on disk is ever unpickled.
"""

import dataclasses
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Size, Tensor, float32
from torch.distributed.checkpoint import StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from tide_mega.checkpoint.manifest import FileRecord
from tide_mega.config.paths import regular_file
from tide_mega.config.stored import read_json
from tide_mega.data.atomic import to_disk

INDEX_FILE = "tensors.json"

Commit = Callable[[dict[str, FileRecord]], None]
"""Called on one rank when every rank's file is on disk, with their records."""


class BoxWriter(StorageWriter):
    """Writes one file a rank into a folder, then the index, then calls `commit`."""

    def __init__(
        self,
        folder: Path,
        save_id: str,
        prepare: Callable[[], None],
        commit: Commit,
        *,
        disk_is_full: bool = False,
    ) -> None:
        """Write to `folder`, which `prepare` makes, on the coordinating rank, before anything is written.

        With `disk_is_full` this rank's file ends after its first bytes, with the error of a full disk.
        """
        self.folder, self.save_id, self.prepare, self.commit = folder, save_id, prepare, commit
        self.disk_is_full = disk_is_full

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Part of the interface; a writer serves one save."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Make the folder."""
        if is_coordinator:
            self.prepare()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Leave the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Give every rank its file."""
        return [
            dataclasses.replace(plan, storage_data=f"rank-{rank:05d}.safetensors")
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's boxes, see them to disk, and checksum them."""
        done: Future[list[WriteResult]] = Future()
        results = []
        path = self.folder / plan.storage_data
        if self.disk_is_full:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        if plan.items:
            boxes = {entry_name(item.index): planner.resolve_data(item) for item in plan.items}
            save_file(boxes, path, metadata={"save_id": self.save_id})  # type: ignore[arg-type]
            path.chmod(self.folder.stat().st_mode & 0o666)  # safetensors makes it its owner's alone
            to_disk(path)
            record = FileRecord.of(path)
            stored = (path.name, record)
            results = [WriteResult(item.index, record.size, stored) for item in plan.items]
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index and commit."""
        files = {name: record for of_rank in results for name, record in (r.storage_data for r in of_rank)}
        file_of = {r.index: r.storage_data[0] for of_rank in results for r in of_rank}
        index = {}
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            boxes = [
                [list(chunk.offsets), list(chunk.sizes), file_of[MetadataIndex(name, chunk.offsets)]]
                for chunk in tensor.chunks
            ]
            index[name] = {"shape": list(tensor.size), "boxes": boxes}
        path = self.folder / INDEX_FILE
        path.write_text(json.dumps({"save_id": self.save_id, "tensors": index}), encoding="utf-8")
        files[INDEX_FILE] = FileRecord.of(path)
        self.commit(files)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        """Any folder will do."""
        return True


class BoxReader(StorageReader):
    """Reads boxes of what BoxWriter wrote, whatever the number of ranks now and then."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of: dict[MetadataIndex, str] = {}

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Part of the interface; a reader serves one folder."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the index."""
        index = read_json(self.folder, INDEX_FILE)["tensors"]
        tensors: dict[str, Any] = {}
        for name, entry in index.items():
            chunks = []
            for offset, size, file in entry["boxes"]:
                chunks.append(ChunkStorageMetadata(Size(offset), Size(size)))
                self._file_of[MetadataIndex(name, offset)] = file
            properties = TensorProperties(dtype=float32)
            tensors[name] = TensorStorageMetadata(properties, Size(entry["shape"]), chunks)
        return Metadata(tensors)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing: the index is there."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Leave the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Leave the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the planned pieces, file by file."""
        by_file: dict[str, list[Any]] = {}
        for item in plan.items:
            by_file.setdefault(self._file_of[item.storage_index], []).append(item)
        for name, items in by_file.items():
            with safe_open(regular_file(self.folder, name), framework="pt") as file:
                for item in items:
                    bounds = zip(item.storage_offsets, item.lengths, strict=True)
                    cut = tuple(slice(first, first + length) for first, length in bounds)
                    values: Tensor = file.get_slice(entry_name(item.storage_index))[cut]
                    planner.resolve_tensor(item).copy_(values)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        """Any folder will do."""
        return True


def entry_name(index: MetadataIndex) -> str:
    """Name a box in its file: `master/layers.0.ffn.up.weight@64,0`."""
    return f"{index.fqn}@{','.join(str(at) for at in index.offset or ())}"
