"""Writes safetensors files piece by piece, so that no tensor is ever held in memory whole.

The safetensors library writes whole tensors only: an embedding of 1 GB would take 1 GB. The format is a JSON
header with the position of every tensor, followed by their bytes (https://github.com/huggingface/safetensors,
"Format"). The tests read the files with the library.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tide_mega.files import to_disk

SHARD_BYTES = 512 * 10**6
INDEX_FILE = "model.safetensors.index.json"
_ALIGNMENT = 8
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}


@dataclass(frozen=True)
class Entry:
    """A tensor to be written, and the source of its rows."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Tensor]]
    """Yields its rows in order, any number at a time, in any dtype."""

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def plan_shards(entries: Iterable[Entry], most: int = SHARD_BYTES) -> list[list[Entry]]:
    """Split entries, in order, into files of at most `most` bytes; a larger entry gets its own file."""
    shards: list[list[Entry]] = []
    left = 0
    for entry in entries:
        if entry.size > left or not shards:
            shards.append([])
            left = most
        shards[-1].append(entry)
        left -= entry.size
    return shards


def write_shards(folder: Path, shards: list[list[Entry]], wrote: Callable[[int], object]) -> None:
    """Write model.safetensors, or several shards and their index, and flush them to disk.

    Args:
        folder: where to write.
        shards: the tensors of each file.
        wrote: called with the number of bytes as they are written.

    Raises:
        OSError: a file cannot be written.
        RuntimeError: the pieces of an entry do not have its shape.
    """
    if len(shards) == 1:
        write_file(folder / "model.safetensors", shards[0], wrote)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / name, shard, wrote)
        weight_map |= dict.fromkeys((entry.name for entry in shard), name)
    total = sum(entry.size for shard in shards for entry in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    to_disk(folder / INDEX_FILE)


def write_file(path: Path, entries: list[Entry], wrote: Callable[[int], object] = lambda size: None) -> None:
    """Write one file and flush it to disk; see `write_shards`."""
    # Wider elements first, as in the library: every tensor is then aligned to its element size.
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    with path.open("wb") as file:
        file.write(_header(entries))
        for entry in entries:
            size = 0
            for data in _bytes_of(entry):
                file.write(data)
                wrote(len(data))
                size += len(data)
            if size != entry.size:
                raise RuntimeError(f"{entry.name} came to {size} bytes instead of {entry.size}")
    to_disk(path)


def _header(entries: list[Entry]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.size
        described = {"dtype": _NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [begin, end]}
        header[entry.name] = described
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(entry: Entry) -> Iterator[memoryview]:
    for piece in entry.pieces():
        if piece.shape[1:] != entry.shape[1:]:
            raise RuntimeError(f"{entry.name} came in pieces of shape {tuple(piece.shape)}")
        if piece.numel():
            flat = piece.to(entry.dtype).contiguous().flatten()
            yield flat.view(torch.uint8).numpy().data
