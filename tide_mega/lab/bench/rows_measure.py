"""Cost of fetching a token's memory rows: by format, from a file, and how often a cache holds them.

Shapes: V vocabulary, N tokens of a step, K memory blocks, D width.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tide_mega.hf.memory_tide import (
    DiskStore,
    MemoryStore,
    RowFormat,
    SidecarFile,
    TableStore,
    TensorStore,
    read_header,
    write_sidecar,
)

TRAINED = "trained"
"""Tables as trained, in bf16, normalised at each look-up."""
_CALLS = 8
_PART = 256


@dataclass(frozen=True)
class Quantiles:
    """Of repeated measurements, in seconds."""

    p10: float
    p50: float
    p95: float

    @classmethod
    def of(cls, values: list[float]) -> "Quantiles":
        """Summarise two values or more."""
        cuts = statistics.quantiles(values, n=100, method="inclusive")
        return cls(cuts[9], cuts[49], cuts[94])


def measure_lookups(
    kinds: list[str], blocks: int, width: int, batch: int, rows: int, dtype: torch.dtype, repeats: int
) -> list[dict[str, Any]]:
    """Return CPU seconds to look up `batch` ids, by format in turns, in tables of `rows` rows in memory.

    `ratio` is the p10 over the first format's.
    """
    stores: dict[str, MemoryStore] = {}
    part_VKD = torch.randn(_PART, blocks, width, generator=torch.Generator().manual_seed(0))
    for kind in kinds:
        if kind == TRAINED:
            tables_VKD = part_VKD.bfloat16().repeat(-(-rows // _PART), 1, 1)
            stores[kind] = TableStore([tables_VKD], torch.ones(blocks, width).bfloat16(), 1e-5)
            continue
        format = RowFormat(kind, blocks, width)
        stores[kind] = TensorStore(format.encode(part_VKD).repeat(-(-rows // _PART), 1), format)
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    generator = torch.Generator().manual_seed(1)
    for turn in range(repeats + 1):
        drawn = [torch.randint(rows, (batch,), generator=generator) for _ in range(_CALLS)]
        for kind, store in stores.items():
            start = time.process_time_ns()
            for ids_N in drawn:
                store.rows(ids_N, dtype)
            spent = (time.process_time_ns() - start) / 1e9
            if turn:
                seconds[kind].append(spent / _CALLS)
    found = {kind: Quantiles.of(seconds[kind]) for kind in kinds}
    return [
        {
            "kind": kind,
            "blocks": blocks,
            "batch": batch,
            "record_bytes": _record_bytes(kind, blocks, width),
            **asdict(found[kind]),
            "ratio": found[kind].p10 / found[kinds[0]].p10,
        }
        for kind in kinds
    ]


def write_random(path: Path, format: RowFormat, rows: int) -> None:
    """Write a file of random rows, a few distinct ones repeated."""
    part_NKD = torch.randn(_PART, format.num_blocks, format.width, generator=torch.Generator().manual_seed(0))
    write_sidecar(path, format, rows, (part_NKD[: rows - first] for first in range(0, rows, _PART)))


def measure_single_reads(path: Path, reads: int, dtype: torch.dtype) -> dict[str, Quantiles]:
    """Return wall seconds of single reads: cold, from the system's page cache, and from the store's own cache."""
    found: dict[str, Quantiles] = {}
    ids = _different(path, reads)
    forget(path)
    for state, cache in (("cold", 0.0), ("page cache", 0.0), ("own cache", 1.0)):
        with _opened(path, cache, 1) as store:
            if cache:
                store.rows(ids, dtype)
            found[state] = Quantiles.of(
                [_wall_seconds(store.rows, ids[n : n + 1], dtype) for n in range(reads)]
            )
    return found


def measure_prompts(
    path: Path, tokens: int, threads: list[int], repeats: int, dtype: torch.dtype
) -> dict[int, Quantiles]:
    """Return wall seconds to read a prompt of distinct ids, cold, by number of threads, in turns."""
    seconds: dict[int, list[float]] = {count: [] for count in threads}
    for turn in range(repeats):
        for count in threads:
            ids = _different(path, tokens, seed=turn)
            forget(path)
            with _opened(path, 1.0, count) as store:
                seconds[count].append(_wall_seconds(store.rows, ids, dtype))
    return {count: Quantiles.of(values) for count, values in seconds.items()}


def measure_hits(folder: Path, ids_N: Tensor, vocab: int, parts: list[float]) -> dict[float, float]:
    """Return the hit rate of a cache of this share of the rows, tokens taken one by one."""
    path = folder / "hits.tide"
    write_random(path, RowFormat("int8", 1, 8), vocab)
    found: dict[float, float] = {}
    for part in parts:
        with _opened(path, part, 1) as store:
            for n in range(len(ids_N)):
                store.rows(ids_N[n : n + 1], torch.float32)
            found[part] = store.stats.hits / len(ids_N)
    path.unlink()
    return found


def forget(path: Path) -> None:
    """Ask the system to drop a file from the page cache, as far as it can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


@contextmanager
def _opened(path: Path, cache: float, threads: int) -> Iterator[DiskStore]:
    with closing(DiskStore(SidecarFile(path), cache, threads)) as store:
        yield store


def _different(path: Path, count: int, seed: int = 0) -> Tensor:
    rows = read_header(path).layout.rows
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:count]


def _record_bytes(kind: str, blocks: int, width: int) -> int:
    return RowFormat("bf16" if kind == TRAINED else kind, blocks, width).record_bytes


def _wall_seconds(action: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - start
