"""The frame of a .wandb file: a header of seven bytes, then a LevelDB log with records in chunks.

The log is cut into blocks of 32 KiB, counted from the header's first byte. A chunk is CRC-32 of type and payload
(4 bytes), length (2), type (1) and payload, and lies within one block; a record is a full chunk, or a first, any
number of middle ones and a last. Fewer than seven bytes at a block's end are padding.
"""

import struct
import zlib
from dataclasses import dataclass

from tide_mega.dashboard.errors import DashboardError

HEADER = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
BLOCK = 32_768
CHUNK = struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass(frozen=True)
class Frames:
    """What is whole in a file."""

    records: list[bytes]
    problems: list[str]
    """What was damaged or cut off, and where, in words."""
    is_cut: bool
    """Whether the file ends within a record, as that of a killed run may."""


class _DamageError(Exception):
    """A chunk that cannot be trusted, nor therefore the rest of its block."""


def read_frames(data: bytes) -> Frames:
    """Return every whole record of a file's bytes, in order; a prefix of a file gives a prefix of its records.

    After a damaged chunk reading goes on at the next block.

    Raises:
        DashboardError: this is no .wandb file, or of another version.
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
        """Where the record that is being put together begins."""

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
        """Take a chunk; return where it ends, or None where the file ends first."""
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
            if not self.problems:  # else of a record whose beginning was damaged
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
