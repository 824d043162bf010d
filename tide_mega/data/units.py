"""Cutting the input into units of work: the same whatever the number of workers."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet

from tide_mega.data.inputs import InputFile

_SMALLEST_UNIT = 4 * 2**20
_LARGEST_UNIT = 512 * 2**20
_UNITS = 64


@dataclass(frozen=True)
class Piece:
    """A file, or the part of it that one unit reads."""

    file: InputFile
    start: int
    """First byte (jsonl: lines that begin at or after it) or first row group (parquet); else 0."""
    stop: int | None
    """End of the same, exclusive; None reads to the end of the file."""
    size: int
    """Bytes, for the balance of units and for the progress bar."""

    @property
    def is_whole(self) -> bool:
        """Whether it is all of its file."""
        return self.start == 0 and self.stop in (None, self.file.size)


@dataclass(frozen=True)
class Unit:
    """What one process tokenises at a time, into shards of its own."""

    number: int
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Input bytes."""
        return sum(piece.size for piece in self.pieces)

    def describe(self) -> list[dict[str, Any]]:
        """What identifies the unit's content: names, sizes, times and ranges, but no folder."""
        described = [asdict(piece) for piece in self.pieces]
        for piece in described:
            del piece["file"]["path"]
            if not piece["file"]["problem"]:
                del piece["file"]["problem"]
        return described


def plan_units(files: list[InputFile], unit_bytes: int) -> list[Unit]:
    """Groups small files and cuts large ones into units of about `unit_bytes` bytes, in order.

    `unit_bytes` 0 takes 1/64 of the input, within 4 MiB to 512 MiB.
    """
    if unit_bytes == 0:
        total = sum(file.size for file in files)
        unit_bytes = min(max(total // _UNITS, _SMALLEST_UNIT), _LARGEST_UNIT)
    units: list[Unit] = []
    pending: list[Piece] = []
    size = 0
    for file in files:
        for piece in _cut(file, unit_bytes):
            pending.append(piece)
            size += piece.size
            if size >= unit_bytes:
                units.append(Unit(len(units), tuple(pending)))
                pending, size = [], 0
    if pending:
        units.append(Unit(len(units), tuple(pending)))
    return units


def _cut(file: InputFile, unit_bytes: int) -> list[Piece]:
    if file.problem:
        return [Piece(file, 0, None, file.size)]
    if file.kind == "jsonl":
        starts = range(0, file.size, unit_bytes)
        stops = [min(start + unit_bytes, file.size) for start in starts]
        return [Piece(file, start, stop, stop - start) for start, stop in zip(starts, stops, strict=True)]
    if file.kind == "parquet":
        return _cut_parquet(file, unit_bytes)
    return [Piece(file, 0, None, file.size)]


def _cut_parquet(file: InputFile, unit_bytes: int) -> list[Piece]:
    try:
        # Opened here: pyarrow takes a path for a URI where it looks like one, and only a path in UTF-8.
        with Path(file.path).open("rb") as opened:
            metadata = pyarrow.parquet.read_metadata(opened)
    except (pyarrow.ArrowException, OSError):
        return [Piece(file, 0, None, file.size)]  # its reader meets the same error and reports it
    if metadata.num_rows == 0:
        return [Piece(file, 0, None, file.size)]
    pieces: list[Piece] = []
    start = size = 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= unit_bytes or group == metadata.num_row_groups - 1:
            pieces.append(Piece(file, start, group + 1, size))
            start, size = group + 1, 0
    return pieces
