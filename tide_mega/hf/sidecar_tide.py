"""The file of memory rows beside a model's weights: one record per token, each readable without the others.

Layout: a header of one page (magic, length, checksum, JSON); the records; a CRC-32 of each; the basis of the joint
low rank, in bf16. Records are placed so that none touches more pages than its size needs: a group of records, then
padding to the end of a page.

Shapes: N rows of a chunk, V rows, K memory blocks, D width, R bytes of a record, r rank.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .rows_tide import RowFormat

PAGE = 4096
CHUNK_BYTES = 1 << 24
COPY_AGAIN = "copy it again from where it came, or export the model again"

_MAGIC = b"TIDEROWS"
_VERSION = 1
_NO_FALLOCATE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class SidecarError(ValueError):
    """The memory's file is missing, damaged or another model's, or cannot be written."""


@dataclass(frozen=True)
class Layout:
    """Offsets of a file's parts, determined by its format and number of rows."""

    format: RowFormat
    rows: int

    @cached_property
    def group_records(self) -> int:
        """Records from one page boundary to the next that the records meet."""
        over = self.format.record_bytes % PAGE
        return PAGE // over if over else 1

    @cached_property
    def group_bytes(self) -> int:
        """Distance between the first records of consecutive groups, in whole pages."""
        return _whole_pages(self.group_records * self.format.record_bytes)

    @cached_property
    def records_at(self) -> int:
        """Offset of the first record."""
        return PAGE

    @cached_property
    def checksums_at(self) -> int:
        """Offset of the records' checksums, uint32 each, little-endian."""
        return self.records_at + -(-self.rows // self.group_records) * self.group_bytes

    @cached_property
    def basis_at(self) -> int:
        """Offset of the basis."""
        return self.checksums_at + _whole_pages(4 * self.rows)

    @cached_property
    def basis_bytes(self) -> int:
        """Length of the basis."""
        r, columns = self.format.basis_shape or (0, 0)
        return 2 * r * columns

    @cached_property
    def file_bytes(self) -> int:
        """Length of the file."""
        return self.basis_at + self.basis_bytes

    @cached_property
    def chunk_rows(self) -> int:
        """Rows of whole groups with about CHUNK_BYTES in total."""
        return max(1, CHUNK_BYTES // self.group_bytes) * self.group_records

    def offset(self, row: int) -> int:
        """Return the offset of a row's record."""
        group, within = divmod(row, self.group_records)
        return self.records_at + group * self.group_bytes + within * self.format.record_bytes

    def described(self) -> dict[str, Any]:
        """Return the layout's entries in the header."""
        return {
            **dataclasses.asdict(self.format),
            "rows": self.rows,
            "record_bytes": self.format.record_bytes,
            "group_records": self.group_records,
            "group_bytes": self.group_bytes,
            "records_at": self.records_at,
            "checksums_at": self.checksums_at,
            "basis_at": self.basis_at,
        }


@dataclass(frozen=True)
class SidecarHeader:
    """The header of a file."""

    layout: Layout
    fingerprint: str
    """SHA-256 of format, records and basis."""
    checksums_crc: int
    basis_crc: int

    def packed(self) -> bytes:
        """Return the file's first page."""
        fields = {
            "version": _VERSION,
            **self.layout.described(),
            "fingerprint": self.fingerprint,
            "checksums_crc": self.checksums_crc,
            "basis_crc": self.basis_crc,
        }
        text = json.dumps(fields, sort_keys=True).encode()
        return (_MAGIC + _word(len(text)) + _word(zlib.crc32(text)) + text).ljust(PAGE, b"\0")

    @classmethod
    def unpacked(cls, page: bytes, path: Path) -> "SidecarHeader":
        """Read a file's first page.

        Raises:
            SidecarError: it is not such a file's, damaged, or of a later version.
        """
        if page[: len(_MAGIC)] != _MAGIC:
            raise SidecarError(f"{path} is not a file of memory rows: {COPY_AGAIN}")
        length, checksum = np.frombuffer(page, "<u4", 2, len(_MAGIC)).tolist()
        text = page[len(_MAGIC) + 8 :][:length]
        if len(page) < PAGE or zlib.crc32(text) != checksum:
            raise SidecarError(f"the header of {path} is damaged: {COPY_AGAIN}")
        try:
            fields = json.loads(text)
            if fields["version"] != _VERSION:
                raise SidecarError(
                    f"{path} has version {fields['version']} of its format, this code reads version {_VERSION}: "
                    "use the code of the folder that it was exported to"
                )
            kept = {key: fields[key] for key in ("kind", "num_blocks", "width", "rank")}
            layout = Layout(RowFormat(**kept), fields["rows"])
            if layout.described() != {key: fields[key] for key in layout.described()}:
                raise ValueError("the layout is not the one of this format")
            return cls(layout, fields["fingerprint"], fields["checksums_crc"], fields["basis_crc"])
        except (KeyError, TypeError) as error:
            raise SidecarError(f"the header of {path} says nothing usable ({error}): {COPY_AGAIN}") from error
        except ValueError as error:
            if isinstance(error, SidecarError):
                raise
            raise SidecarError(f"the header of {path} says nothing usable ({error}): {COPY_AGAIN}") from error


class SidecarFile:
    """An open file of rows, with header and checksum block verified; reading is thread-safe.

    Reads refer to the file that was opened, even if another one takes its name.

    Raises:
        SidecarError: it is missing, truncated, damaged, or not such a file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise SidecarError(
                f"{path}, the file with the memory, cannot be opened: {error.strerror}"
            ) from error
        try:
            self.header = SidecarHeader.unpacked(self._read_at_most(PAGE, 0), path)
            layout = self.header.layout
            found = os.fstat(self._descriptor).st_size
            if found != layout.file_bytes:
                raise SidecarError(
                    f"{path} has {found:,} bytes instead of {layout.file_bytes:,}: {COPY_AGAIN}"
                )
            block = self._read(4 * layout.rows, layout.checksums_at)
            if zlib.crc32(block) != self.header.checksums_crc:
                raise SidecarError(f"the block of checksums in {path} is damaged: {COPY_AGAIN}")
            self._checksums = np.frombuffer(block, "<u4")
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        except BaseException:
            self.close()
            raise

    def read_row(self, row: int, into: memoryview) -> None:
        """Read a row's record [R] and verify it.

        Raises:
            SidecarError: it cannot be read, is truncated, or does not match its checksum.
        """
        self._read_into(into, self.header.layout.offset(row))
        if zlib.crc32(into) != self._checksums[row]:
            raise SidecarError(f"row {row} of {self.path} is damaged: {COPY_AGAIN}")

    def chunks(self) -> Iterator[tuple[int, Tensor, list[int]]]:
        """Yield (first row, records [N, R], damaged rows among them) over all rows.

        Raises:
            SidecarError: a chunk cannot be read.
        """
        layout = self.header.layout
        R = layout.format.record_bytes
        for first in range(0, layout.rows, layout.chunk_rows):
            rows = min(layout.chunk_rows, layout.rows - first)
            groups = -(-rows // layout.group_records)
            content = np.frombuffer(self._read(groups * layout.group_bytes, layout.offset(first)), np.uint8)
            packed = content.reshape(groups, -1)[:, : layout.group_records * R].reshape(-1, R)[:rows]
            records = np.ascontiguousarray(packed)
            damaged = np.flatnonzero(_checksums_of(records) != self._checksums[first : first + rows]) + first
            yield first, torch.from_numpy(records), damaged.tolist()

    def basis(self) -> Tensor | None:
        """Return the basis [r, K * D], bf16; None if the format has none.

        Raises:
            SidecarError: it is damaged.
        """
        layout = self.header.layout
        shape = layout.format.basis_shape
        if shape is None:
            return None
        content = self._read(layout.basis_bytes, layout.basis_at)
        if zlib.crc32(content) != self.header.basis_crc:
            raise SidecarError(f"the basis in {self.path} is damaged: {COPY_AGAIN}")
        return torch.frombuffer(content, dtype=torch.bfloat16).view(shape)

    def verify(self) -> None:
        """Verify every record, the basis and the fingerprint.

        Raises:
            SidecarError: names the damaged rows.
        """
        digest = _digest_of(self.header.layout)
        damaged: list[int] = []
        for _, records_NR, bad in self.chunks():
            damaged += bad
            digest.update(records_NR.numpy())
        if damaged:
            some = ", ".join(map(str, damaged[:10])) + (", ..." if len(damaged) > 10 else "")
            raise SidecarError(f"{len(damaged)} rows of {self.path} are damaged ({some}): {COPY_AGAIN}")
        basis = self.basis()
        if basis is not None:
            digest.update(basis.view(torch.uint8).numpy())
        if digest.hexdigest() != self.header.fingerprint:
            raise SidecarError(f"the contents of {self.path} are not those of its fingerprint: {COPY_AGAIN}")

    def copy(self, to: Path) -> None:
        """Copy the opened file, atomically; does nothing if `to` is that file.

        Raises:
            SidecarError: it cannot be read or written.
        """
        with contextlib.suppress(OSError):
            if os.path.samestat(to.stat(), os.fstat(self._descriptor)):
                return
        total = self.header.layout.file_bytes
        with _whole_or_absent(to, total) as file:
            for first in range(0, total, CHUNK_BYTES):
                file.write(self._read(min(CHUNK_BYTES, total - first), first))

    @property
    def is_closed(self) -> bool:
        """Whether the file was closed."""
        return self._descriptor < 0

    def close(self) -> None:
        """Close the file; no read may be in progress."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _read(self, size: int, offset: int) -> bytearray:
        content = bytearray(size)
        self._read_into(memoryview(content), offset)
        return content

    def _read_into(self, into: memoryview, offset: int) -> None:
        if self._read_some(into, offset) < len(into):
            end = offset + len(into)
            raise SidecarError(f"{self.path} ends before byte {end:,}, which is needed: {COPY_AGAIN}")

    def _read_at_most(self, size: int, offset: int) -> bytes:
        content = bytearray(size)
        return bytes(content[: self._read_some(memoryview(content), offset)])

    def _read_some(self, into: memoryview, offset: int) -> int:
        """Read until `into` is full or the file ends; return the number of bytes read."""
        done = 0
        try:
            while done < len(into):
                got = os.preadv(self._descriptor, [into[done:]], offset + done)
                if got == 0:
                    break
                done += got
        except OSError as error:
            raise SidecarError(
                f"{self.path}, the file with the memory, cannot be read: {error.strerror}"
            ) from error
        return done


def write_sidecar(
    path: Path, format: RowFormat, num_rows: int, chunks: Iterable[Tensor], basis: Tensor | None = None
) -> str:
    """Write the finished rows of all tokens to a file that is complete or absent even if the process is killed.

    Args:
        path: the file.
        format: of the records.
        num_rows: V.
        chunks: rows [N, K, D], fp32, of all tokens in order; each is written before the next is requested.
        basis: with kind=rank, [r, K * D]; rounded to bf16 before it is used.

    Returns:
        The fingerprint of the contents.

    Raises:
        SidecarError: the disk is full, or the file cannot be written.
        RowError: a row is not finite.
        ValueError: the chunks have a wrong number or shape of rows.
    """
    layout = Layout(format, num_rows)
    basis = None if basis is None else basis.detach().cpu().bfloat16().contiguous()
    digest = _digest_of(layout)
    checksums = np.empty(num_rows, "<u4")
    with _whole_or_absent(path, layout.file_bytes) as file:
        file.seek(layout.records_at)
        done = 0
        waiting = torch.empty(0, format.record_bytes, dtype=torch.uint8)
        for rows_NKD in chunks:
            on_device = None if basis is None else basis.to(rows_NKD.device)
            records_NR = format.encode(rows_NKD.detach(), on_device, first_row=done).cpu()
            if done + len(records_NR) > num_rows:
                raise ValueError(f"more than {num_rows:,} rows came for {path}")
            digest.update(records_NR.numpy())
            checksums[done : done + len(records_NR)] = _checksums_of(records_NR.numpy())
            done += len(records_NR)
            waiting = torch.cat((waiting, records_NR))
            whole = (
                len(waiting)
                if done == num_rows
                else len(waiting) // layout.group_records * layout.group_records
            )
            file.write(_in_groups(waiting[:whole], layout))
            waiting = waiting[whole:]
        if done < num_rows:
            raise ValueError(f"{done:,} rows came for {path} instead of {num_rows:,}")
        file.seek(layout.checksums_at)
        file.write(checksums)
        basis_bytes = b"" if basis is None else basis.view(torch.uint8).numpy().tobytes()
        digest.update(basis_bytes)
        file.seek(layout.basis_at)
        file.write(basis_bytes)
        file.seek(0)
        header = SidecarHeader(
            layout, digest.hexdigest(), zlib.crc32(checksums.data), zlib.crc32(basis_bytes)
        )
        file.write(header.packed())
    return header.fingerprint


def read_header(path: Path) -> SidecarHeader:
    """Return a file's header, after checking its checksum and the file's length.

    Raises:
        SidecarError: the file is missing, truncated, damaged, or not a file of memory rows.
    """
    file = SidecarFile(path)
    file.close()
    return file.header


def verify_sidecar(path: Path) -> None:
    """Verify a whole file.

    Raises:
        SidecarError: it cannot be used; damaged rows are named.
    """
    with contextlib.closing(SidecarFile(path)) as file:
        file.verify()


@contextlib.contextmanager
def _whole_or_absent(path: Path, size: int) -> Iterator[Any]:
    """Open a temporary file of `size` bytes beside `path`; on success it is flushed and renamed to `path`."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            _reserve(file.fileno(), size)
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # not supported by every file system
                os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise SidecarError(
            f"{path} could not be written: {error.strerror}; it takes {size:,} bytes there"
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _reserve(descriptor: int, size: int) -> None:
    """Allocate the file's bytes up front, so that a full disk is detected before the work."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in _NO_FALLOCATE:
                raise
    os.ftruncate(descriptor, size)


def _in_groups(records_NR: Tensor, layout: Layout) -> NDArray[np.uint8]:
    """Return records in file layout, padded to whole groups."""
    rows, size = records_NR.shape
    groups = -(-rows // layout.group_records)
    content = np.zeros((groups, layout.group_bytes), np.uint8)
    padded = np.zeros((groups * layout.group_records, size), np.uint8)
    padded[:rows] = records_NR.numpy()
    content[:, : layout.group_records * size] = padded.reshape(groups, layout.group_records * size)
    return content


def _digest_of(layout: Layout) -> Any:
    """Return a SHA-256 started with the format; the caller adds records and basis."""
    return hashlib.sha256(json.dumps(layout.described(), sort_keys=True).encode())


def _checksums_of(records_NR: NDArray[np.uint8]) -> NDArray[np.uint32]:
    return np.fromiter((zlib.crc32(record.data) for record in records_NR), np.uint32, len(records_NR))


def _word(value: int) -> bytes:
    return value.to_bytes(4, "little")


def _whole_pages(size: int) -> int:
    return -(-size // PAGE) * PAGE
