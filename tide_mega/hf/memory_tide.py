"""The memory outside training: stores that return the rows of tokens from the device, host memory or a file.

Shapes: N ids, U distinct ids among them, V vocabulary, K memory blocks, D width, R bytes of a record.
"""

import math
import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .rows_tide import KINDS, RowError, RowFormat, finished
from .sidecar_tide import (
    COPY_AGAIN,
    SidecarError,
    SidecarFile,
    SidecarHeader,
    read_header,
    verify_sidecar,
    write_sidecar,
)

__all__ = [
    "KINDS",
    "DiskStore",
    "HostStore",
    "MemoryStore",
    "RowError",
    "RowFormat",
    "SidecarError",
    "SidecarFile",
    "SidecarHeader",
    "TableStore",
    "TensorStore",
    "finished",
    "open_store",
    "read_header",
    "rows_of_parts",
    "verify_sidecar",
    "write_sidecar",
]


PLACES = ("device", "host", "disk")
Bytes = NDArray[np.uint8]


@dataclass
class StoreStats:
    """Counters of a store on disk; the other stores count nothing."""

    hits: int = 0
    """Tokens whose row was in memory, or requested before in the same call."""
    misses: int = 0
    """Rows read from the file, prefetched or on demand."""
    bytes_read: int = 0
    seconds_waited: float = 0.0
    """Time that `rows` waited for reads."""


class MemoryStore(ABC):
    """Returns the rows M_k(v) of tokens."""

    file: SidecarFile | None = None

    def __init__(self) -> None:
        self.stats = StoreStats()

    @abstractmethod
    def rows(self, ids_N: Tensor, dtype: torch.dtype) -> Tensor:
        """Return M [N, K, D] of the ids, in `dtype` and on the device of `ids_N`.

        Raises:
            IndexError: an id is negative or beyond the rows (a device-side assertion for rows on CUDA).
            SidecarError: a row cannot be read from the file, or is damaged.
        """

    def prefetch(self, ids_N: Tensor) -> None:  # noqa: B027 a store in memory has nothing to do
        """Start reading the rows of ids that will be requested, without waiting."""

    def copy_file(self, to: Path) -> None:
        """Copy the file that the store was opened from, as it was then.

        Raises:
            SidecarError: there is no file, or it cannot be read or written.
        """
        if self.file is None:
            raise SidecarError(f"this memory was not opened from a file, nothing can be copied to {to}")
        self.file.copy(to)

    def close(self) -> None:
        """Close the file and end threads; no call may be in progress."""
        if self.file is not None:
            self.file.close()


class TensorStore(MemoryStore):
    """Records on the device, in one tensor or split into parts by rows."""

    def __init__(
        self,
        records: Tensor | Sequence[Tensor],
        format: RowFormat,
        basis: Tensor | None = None,
        file: SidecarFile | None = None,
    ) -> None:
        """Take records [V, R], uint8, or parts of them in order; with kind=rank the basis [r, K * D]."""
        super().__init__()
        self.format = format
        self.parts = [records] if isinstance(records, Tensor) else list(records)
        self.file = file
        self._basis = None if basis is None else _Basis(basis)

    def rows(self, ids_N: Tensor, dtype: torch.dtype) -> Tensor:
        """See MemoryStore; traceable, without a branch on the ids."""
        basis = None if self._basis is None else self._basis.on(ids_N.device, dtype)
        return self.format.decode(rows_of_parts(self.parts, ids_N), dtype, basis)


class TableStore(MemoryStore):
    """Tables as trained, whose rows are normalised on demand."""

    def __init__(self, parts: Sequence[Tensor], gains_KD: Tensor, eps: float) -> None:
        """Take parts [rows, K, D] of the tables in order, the norm's gains and its epsilon."""
        super().__init__()
        self.parts = list(parts)
        self.gains_KD = gains_KD
        self.eps = eps

    def rows(self, ids_N: Tensor, dtype: torch.dtype) -> Tensor:
        """See MemoryStore; traceable, without a branch on the ids."""
        return finished(rows_of_parts(self.parts, ids_N), self.gains_KD, self.eps, dtype)


class _RecordsOnHost(MemoryStore):
    """Gathers records in host memory and decodes them on the device of the ids."""

    def __init__(self, file: SidecarFile) -> None:
        super().__init__()
        self._source = self.file = file
        self.format = file.header.layout.format
        self.num_rows = file.header.layout.rows
        basis = file.basis()
        self._basis = None if basis is None else _Basis(basis)

    def rows(self, ids_N: Tensor, dtype: torch.dtype) -> Tensor:
        """See MemoryStore. On CUDA it waits only for the ids; records are copied asynchronously."""
        device = ids_N.device
        ids = self._checked(ids_N)
        different = list(dict.fromkeys(ids))
        R = self.format.record_bytes
        records_UR = torch.empty(len(different), R, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._gather(different, len(ids), records_UR.numpy())
        basis = None if self._basis is None else self._basis.on(device, dtype)
        rows_UKD = self.format.decode(records_UR.to(device, non_blocking=True), dtype, basis)
        if len(different) == len(ids):
            return rows_UKD
        place = {row: u for u, row in enumerate(different)}
        return rows_UKD.index_select(0, torch.tensor([place[row] for row in ids], device=device))

    @abstractmethod
    def _gather(self, different: list[int], asked: int, into_UR: Bytes) -> None:
        """Write the records of distinct ids, for `asked` requested tokens, into host memory."""

    def _checked(self, ids_N: Tensor) -> list[int]:
        if self._source.is_closed:
            raise SidecarError(f"{self._source.path} is closed: open the model again")
        ids: list[int] = ids_N.tolist()
        for row in ids:
            if not 0 <= row < self.num_rows:
                raise IndexError(
                    f"token id {row} has no row in {self._source.path}: its rows are 0..{self.num_rows - 1}"
                )
        return ids


class HostStore(_RecordsOnHost):
    """All records in host memory; requested ones go to CUDA through pinned memory."""

    def __init__(self, file: SidecarFile) -> None:
        """Read and check all records.

        Raises:
            SidecarError: a row is damaged or cannot be read.
        """
        super().__init__(file)
        self._records_VR = all_records(file, torch.device("cpu")).numpy()

    def _gather(self, different: list[int], asked: int, into_UR: Bytes) -> None:
        _take(self._records_VR, different, into_UR)


class _Read:
    """A read in progress: its ids, their records, and its outcome."""

    def __init__(self, ids: list[int], record_bytes: int) -> None:
        self.ids = ids
        self.place = {row: n for n, row in enumerate(ids)}
        self.records_NR = np.empty((len(ids), record_bytes), np.uint8)
        self.error: BaseException | None = None
        self.ended = threading.Event()

    def take(self, ids: list[int]) -> Bytes:
        """Wait, and return the records of some of its ids."""
        self.ended.wait()
        if self.error is not None:
            raise SidecarError(str(self.error)) from self.error
        return self.records_NR[[self.place[row] for row in ids]]


class DiskStore(_RecordsOnHost):
    """Rows read from the file on demand, with an LRU cache for a share of all rows.

    `rows` and `prefetch` are thread-safe. A row is read once however many threads wait for it, and every record is
    verified when read.
    """

    def __init__(self, file: SidecarFile, cache: float = 0.05, threads: int = 16) -> None:
        """Cache the share `cache` of the rows, at least one row; read with up to `threads` threads.

        Raises:
            ValueError: `cache` is not in 0..1, or there are no threads.
        """
        if not 0 <= cache <= 1:
            raise ValueError(f"the memory's cache is a part of its rows, 0 to 1, not {cache}")
        if threads < 1:
            raise ValueError(f"rows are read with 1 thread or more, not {threads}")
        super().__init__(file)
        self.capacity = max(1, math.ceil(cache * self.num_rows))
        self._threads = threads
        self._kept_CR = np.empty((self.capacity, self.format.record_bytes), np.uint8)
        self._slots: OrderedDict[int, int] = OrderedDict()
        """Slots of rows in `_kept_CR`, least recently used first."""
        self._reads: dict[int, _Read] = {}
        self._ahead: set[int] = set()
        """Prefetched rows not requested yet."""
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="memory-rows")

    def prefetch(self, ids_N: Tensor) -> None:
        """See MemoryStore; if the ids exceed the cache, only the first ones are read."""
        different = list(dict.fromkeys(self._checked(ids_N)))[: self.capacity]
        with self._lock:
            begun = self._begin(different)
            self._ahead.update(row for read in begun for row in read.ids)
        with self._ended_on_error(begun):
            for read in begun:
                self._pool.submit(self._run, read)

    def close(self) -> None:
        """See MemoryStore."""
        self._pool.shutdown()
        super().close()

    def _gather(self, different: list[int], asked: int, into_UR: Bytes) -> None:
        with self._lock:
            slots = [self._slots[row] for row in different if row in self._slots]
            if len(slots) == len(different):
                _take(self._kept_CR, slots, into_UR)
            elif slots:
                into_UR[[u for u, row in enumerate(different) if row in self._slots]] = self._kept_CR[slots]
            missing = [(u, row) for u, row in enumerate(different) if row not in self._slots]
            begun = self._begin([row for _, row in missing])
            awaited: dict[_Read, list[tuple[int, int]]] = {}
            for u, row in missing:
                awaited.setdefault(self._reads[row], []).append((u, row))
            read_for_these = sum(len(read.ids) for read in begun) + sum(
                row in self._ahead for row in different
            )
            self.stats.hits += asked - read_for_these
            self._ahead.difference_update(different)
        start = time.perf_counter()
        with self._ended_on_error(begun):
            for read in begun[1:]:
                self._pool.submit(self._run, read)
            for read in begun[:1]:
                self._run(read)
            for read, wanted in awaited.items():
                into_UR[[u for u, _ in wanted]] = read.take([row for _, row in wanted])
        with self._lock:
            self._keep(different, into_UR)
            if awaited:
                self.stats.seconds_waited += time.perf_counter() - start

    def _begin(self, ids: list[int]) -> list[_Read]:
        """Return reads to run for ids that are neither cached nor being read, divided among the threads."""
        missing = [row for row in ids if row not in self._slots and row not in self._reads]
        dealt = [missing[first :: self._threads] for first in range(min(self._threads, len(missing)))]
        begun = [_Read(part, self.format.record_bytes) for part in dealt]
        for read in begun:
            self._reads.update(dict.fromkeys(read.ids, read))
        return begun

    def _run(self, read: _Read) -> None:
        with self._ended_on_error([read]):
            for n, row in enumerate(read.ids):
                self._source.read_row(row, read.records_NR[n].data)
            with self._lock:
                self._keep(read.ids, read.records_NR)
                self._end(read)
                self.stats.misses += len(read.ids)
                self.stats.bytes_read += read.records_NR.size

    def _keep(self, ids: list[int], records_NR: Bytes) -> None:
        """Mark ids as most recently used, in order, and cache their records; the caller holds the lock."""
        places: list[int] = []
        slots: list[int] = []
        for n in range(max(0, len(ids) - self.capacity), len(ids)):
            if ids[n] in self._slots:
                self._slots.move_to_end(ids[n])
                continue
            slot = len(self._slots)
            if slot == self.capacity:
                row, slot = self._slots.popitem(last=False)
                self._ahead.discard(row)
            self._slots[ids[n]] = slot
            places.append(n)
            slots.append(slot)
        if slots:
            self._kept_CR[slots] = records_NR[places]

    def _end(self, read: _Read, error: BaseException | None = None) -> None:
        """Notify waiting threads; the caller holds the lock."""
        for row in read.ids:
            if self._reads.get(row) is read:
                del self._reads[row]
        if not read.ended.is_set():
            read.error = error
            read.ended.set()

    @contextmanager
    def _ended_on_error(self, begun: list[_Read]) -> Iterator[None]:
        """Context that ends reads with any exception raised, so that no thread waits for them forever."""
        try:
            yield
        except BaseException as error:
            with self._lock:
                for read in begun:
                    self._end(read, error)
                    self._ahead.difference_update(read.ids)
            raise


class _Basis:
    """The basis of the joint low rank, cached in the dtype and on the device last used."""

    def __init__(self, basis: Tensor) -> None:
        self._given = self._ready = basis

    def on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        dtype = dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32
        if self._ready.device != device or self._ready.dtype != dtype:
            self._ready = self._given.to(device, dtype)
        return self._ready


def rows_of_parts(parts: Sequence[Tensor], ids_N: Tensor) -> Tensor:
    """Return rows by id [N, ...] from a table's parts, in order, without branching on the ids."""
    if len(parts) == 1:
        return parts[0].index_select(0, ids_N)
    first = 0
    found: Tensor | None = None
    for part in parts:
        local_N = ids_N - first
        rows = part.index_select(0, local_N.clamp(0, len(part) - 1))
        inside = (local_N >= 0).reshape(-1, *(1,) * (part.dim() - 1))
        found = rows if found is None else torch.where(inside, rows, found)
        first += len(part)
    assert found is not None
    return found


def _take(records_NR: Bytes, places: list[int], into_UR: Bytes) -> None:
    np.take(
        records_NR, places, axis=0, out=into_UR, mode="clip"
    )  # with mode="raise" numpy makes another copy


def all_records(file: SidecarFile, device: torch.device) -> Tensor:
    """Return all records of a file [V, R] on a device, read and verified chunk by chunk.

    Raises:
        SidecarError: a row is damaged or cannot be read.
    """
    layout = file.header.layout
    # Servers open models in inference mode, but use the tensor from other threads outside of it.
    with torch.inference_mode(False):
        records_VR = torch.empty(layout.rows, layout.format.record_bytes, dtype=torch.uint8, device=device)
    for first, records_NR, damaged in file.chunks():
        if damaged:
            raise SidecarError(f"row {damaged[0]} of {file.path} is damaged: {COPY_AGAIN}")
        records_VR[first : first + len(records_NR)] = records_NR.to(device)
    return records_VR


def open_store(
    path: Path,
    format: RowFormat,
    *,
    rows: int,
    fingerprint: str | None,
    place: str = "disk",
    cache: float = 0.05,
    device: torch.device | str | None = None,
    threads: int = 16,
) -> MemoryStore:
    """Open the file of a model's memory.

    Args:
        path: the file.
        format: the model's.
        rows: V, the model's.
        fingerprint: of the contents that the model expects; None means any.
        place: where rows are kept: device, host or disk.
        cache: with place=disk, the share of the rows kept in memory once read.
        device: with place=device, the device; None means the CPU.
        threads: with place=disk, concurrent reads.

    Raises:
        SidecarError: the file is missing, truncated, damaged, or another model's.
        ValueError: an unknown place, or a cache or threads out of range.
    """
    if place not in PLACES:
        raise ValueError(f"memory_store is {place!r}; it is one of {', '.join(PLACES)}")
    file = SidecarFile(path)
    try:
        _refuse_foreign(file, format, rows, fingerprint)
        if place == "disk":
            return DiskStore(file, cache, threads)
        if place == "host":
            return HostStore(file)
        on = torch.device(device or "cpu")
        basis = file.basis()
        return TensorStore(all_records(file, on), format, None if basis is None else basis.to(on), file)
    except BaseException:
        file.close()
        raise


def _refuse_foreign(file: SidecarFile, format: RowFormat, rows: int, fingerprint: str | None) -> None:
    layout = file.header.layout
    if (layout.format, layout.rows) != (format, rows):
        raise SidecarError(
            f"{file.path} holds {layout.rows} rows of {layout.format}, the model needs {rows} rows of {format}: "
            f"it is another model's, {COPY_AGAIN}"
        )
    if fingerprint not in (None, file.header.fingerprint):
        raise SidecarError(
            f"{file.path} has the fingerprint {file.header.fingerprint[:16]}..., the model needs "
            f"{str(fingerprint)[:16]}...: it is another model's, {COPY_AGAIN}"
        )
