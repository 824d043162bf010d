"""Reads the records of an offline W&B run from its .wandb file.

With tide_mega.training.loggers and workspace.py this is one of the three modules that import wandb.

A .wandb file is a header of seven bytes, then a LevelDB log, which holds records in chunks. The log is divided
into blocks of 32 KiB, counted from the header's first byte. A chunk consists of the CRC-32 of type and payload (4
bytes), the length (2), the type (1) and the payload, and lies within one block. A record is one full chunk, or a
first, any number of middle ones, and a last. Fewer than seven bytes at the end of a block are padding.
"""

import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from wandb.proto import wandb_internal_pb2 as pb

from tide_mega.errors import DashboardError
from tide_mega.files import parse_json
from tide_mega.lab.dashboard.history import Row
from tide_mega.lab.dashboard.panel import AXES

HEADER = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
BLOCK = 32_768
CHUNK = struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass(frozen=True)
class Frames:
    """The intact records of a file."""

    records: list[bytes]
    problems: list[str]
    """Descriptions of what was damaged or cut off, and where."""
    is_cut: bool
    """Whether the file ends within a record, as a killed run's may."""


class _DamageError(Exception):
    """A chunk that cannot be trusted, and with it the rest of its block."""


def read_frames(data: bytes) -> Frames:
    """Return every whole record of a file's bytes, in order; a prefix of a file gives a prefix of its records.

    After a damaged chunk, reading continues at the next block.

    Raises:
        DashboardError: it is not a .wandb file, or one of another version.
    """
    if not HEADER.startswith(data[: len(HEADER)]):
        raise DashboardError(
            f"the file begins with {data[: len(HEADER)]!r} where a .wandb file has {HEADER!r}: it is of another "
            "kind or version, or damaged at its beginning."
        )
    reader = _Reader(data)
    reader.read()
    return Frames(reader.records, reader.problems, reader.is_cut)


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.records: list[bytes] = []
        self.problems: list[str] = []
        self.is_cut = False
        self._data = data
        self._parts: list[bytes] = []
        self._begins: int | None = None
        """Start of the record being assembled."""

    def read(self) -> None:
        data, position = self._data, len(HEADER)
        if len(data) < position:
            self._cut(len(data), "its header")
            return
        while position < len(data):
            left = BLOCK - position % BLOCK
            if left < CHUNK.size:
                position += left
                continue
            if position + CHUNK.size > len(data):
                self._cut(position, "a chunk's header")
                return
            try:
                end = self._chunk(position, left)
            except _DamageError as damage:
                self._drop(f"{damage} at byte {position:,}; the rest of its block was passed over")
                position += left
                continue
            if end is None:
                return
            position = end
        if self._begins is not None:
            self._cut(self._begins, "a record")

    def _chunk(self, position: int, left: int) -> int | None:
        """Read a chunk; return its end, or None if the file ends first."""
        checksum, length, kind = CHUNK.unpack_from(self._data, position)
        begin = position + CHUNK.size
        end = begin + length
        if not any((checksum, length, kind)) and not self._data[position:].strip(b"\0"):
            self._cut(position, "zeros that nothing was written over")
            return None
        if kind not in (FULL, FIRST, MIDDLE, LAST):
            raise _DamageError(f"a chunk of unknown type {kind}")
        if CHUNK.size + length > left:
            raise _DamageError("a chunk longer than its block")
        if end > len(self._data):
            self._cut(position, "a chunk")
            return None
        payload = self._data[begin:end]
        if zlib.crc32(payload, zlib.crc32(bytes([kind]))) != checksum:
            raise _DamageError("a chunk whose CRC is wrong")
        self._put(kind, payload, position)
        return end

    def _put(self, kind: int, payload: bytes, position: int) -> None:
        if kind in (FULL, FIRST):
            if self._begins is not None:
                self._drop(f"a record without an end before byte {position:,}")
            self._begins, self._parts = position, []
        elif self._begins is None:
            if not self.problems:  # otherwise it belongs to a record whose beginning was damaged
                self._drop(f"a record without a beginning at byte {position:,}")
            return
        self._parts.append(payload)
        if kind in (FULL, LAST):
            self.records.append(b"".join(self._parts))
            self._begins = None

    def _drop(self, what: str) -> None:
        self.problems.append(what)
        self._begins = None

    def _cut(self, position: int, what: str) -> None:
        self.is_cut = True
        lost = len(self._data) - (position if self._begins is None else self._begins)
        self.problems.append(f"the file ends within {what}: its last {lost:,} bytes are no whole record")


@dataclass
class OfflineRun:
    """The records of one .wandb file."""

    path: Path
    run_id: str = ""
    name: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    """As given to `wandb.init`, nested."""
    rows: list[Row] = field(default_factory=list)
    """The logged rows, in order, without W&B's own keys."""
    is_finished: bool = False
    """Whether the run was closed; otherwise it was killed or is still running."""
    notes: list[str] = field(default_factory=list)
    """What could not be read, and what was left out."""


def read_offline(path: Path) -> OfflineRun:
    """Read a .wandb file, whole or cut off by a kill.

    Raises:
        DashboardError: it cannot be opened, or is not a .wandb file.
    """
    try:
        frames = read_frames(path.read_bytes())
    except OSError as error:
        raise DashboardError(f"{path} cannot be read: {error}.") from error
    except DashboardError as error:
        raise DashboardError(f"{path}: {error}") from error
    run = OfflineRun(path, notes=list(frames.problems))
    without_axes = 0
    for number, payload in enumerate(frames.records, start=1):
        try:
            record = pb.Record.FromString(payload)
        except DecodeError as error:
            run.notes.append(f"record {number} of {len(frames.records)} is no W&B record ({error})")
            continue
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.run_id, run.name = record.run.run_id, record.run.display_name
            run.config |= {update.key: parse_json(update.value_json) for update in record.run.config.update}
        elif kind == "exit":
            run.is_finished = True
        elif kind == "history":
            row = _row(record.history.item, run.notes)
            if all(isinstance(row.get(axis), int | float) for axis in AXES):
                run.rows.append(row)
            else:
                without_axes += 1
    if without_axes:
        run.notes.append(f"{without_axes} rows without step and tokens, which training did not log")
    return run


def _row(items: Iterable[pb.HistoryItem], notes: list[str]) -> Row:
    row: Row = {}
    for item in items:
        key = item.key or ".".join(item.nested_key)
        if key.startswith("_"):
            continue
        value = _number(item.value_json)
        if value is None:
            note = f"{key} is not a number and was left out"
            if note not in notes:
                notes.append(note)
        else:
            row[key] = value
    return row


def _number(value_json: str) -> float | int | None:
    try:
        value = parse_json(value_json)
        # Values that JSON lacks (NaN, infinities) may be stored as strings.
        return float(value) if value in ("NaN", "Infinity", "-Infinity") else _plain(value)
    except (ValueError, TypeError):
        return None


def _plain(value: Any) -> float | int | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
