"""The tensors of an exported folder, read from a checkpoint a few rows at a time.

Shapes: N rows of a chunk, V vocabulary, K memory blocks, D width, R bytes of a record, r rank.
"""

import logging
import math
from collections.abc import Iterator
from functools import partial

import psutil
import torch
from torch import Tensor

from tide_mega.config.schema import TideConfig
from tide_mega.errors import ExportError
from tide_mega.export.low_rank import joint_basis
from tide_mega.export.names import llama_name
from tide_mega.export.options import Choice
from tide_mega.export.shards import SHARD_BYTES, Entry
from tide_mega.hf.rows_tide import RowFormat, finished, part_bounds
from tide_mega.model.canonical import GAINS, TABLES
from tide_mega.parallel.device import DTYPES
from tide_mega.trained.run import StoredWeights

log = logging.getLogger(__name__)

CHUNK_ELEMENTS = 2**24
"""Stored elements read at a time: 64 MB."""
BASIS_DTYPE = torch.bfloat16
"""As in the sidecar."""


def base_entries(weights: StoredWeights, dtype: torch.dtype) -> list[Entry]:
    """Return every weight outside the memory, by transformers' names."""
    return [
        Entry(llama_name(name), dtype, shape, partial(_rows, weights, name, 0, shape[0]))
        for name, shape in sorted(weights.shapes.items(), key=lambda item: _place(item[0]))
        if name not in (TABLES, GAINS)
    ]


def _place(name: str) -> tuple[int, int, str]:
    """Sort key in the order of computation: embedding, layers by number, final norm, output."""
    if name.startswith("layers."):
        return 1, int(name.split(".")[1]), name
    return (0 if name.startswith("embedding") else 2), 0, name


class MemoryRows:
    """The memory of a checkpoint in one of the formats of `tide_mega.hf.rows_tide`."""

    def __init__(self, weights: StoredWeights, config: TideConfig, choice: Choice) -> None:
        """Describe the memory; call `prepare` before producing rows."""
        self.weights, self.choice, self.eps = weights, choice, config.model.norm_eps
        self.num_rows, K, D = weights.shape(TABLES)
        self.format = RowFormat(choice.tables, K, D, choice.columns(K, D))
        self.basis: Tensor | None = None
        """[r, K D] of tables=rank, bf16."""

    def prepare(self) -> None:
        """Compute what all rows share, the basis of tables=rank; reads the rows once.

        Raises:
            ExportError: it needs more memory than there is.
            RowError: a row is not finite.
        """
        if self.format.basis_shape is None:
            return
        rank, columns = self.format.basis_shape
        needed, free = 12 * columns**2, psutil.virtual_memory().available
        if needed > free:
            raise ExportError(
                f"the joint basis of K d = {columns:,} columns takes {needed / 1e9:.1f} GB of memory, and "
                f"{free / 1e9:.1f} GB are free: use another machine, or tables=int4"
            )
        log.info("finding the joint basis: %d of %d columns", rank, columns)
        found = joint_basis(self.finished_rows(), rank)
        log.info("it keeps %.2f %% of the rows' squares", 100 * found.energy_kept)
        self.basis = found.basis_rC.to(BASIS_DTYPE)

    @property
    def row_bytes(self) -> int:
        """Bytes stored per token."""
        if self.choice.is_trained:
            return self.format.num_blocks * self.format.width * DTYPES[self.choice.tables].itemsize
        return self.format.record_bytes

    @property
    def part_rows(self) -> int:
        """Rows of each tensor that the memory is split into, so that each fits a file."""
        return min(self.num_rows, max(1, SHARD_BYTES // self.row_bytes))

    def entries(self) -> list[Entry]:
        """Return the tensors written among the weights; none for a sidecar."""
        if self.choice.memory == "sidecar":
            return []
        K, D = self.format.num_blocks, self.format.width
        parts = list(enumerate(part_bounds(self.num_rows, self.part_rows)))
        if self.choice.is_trained:
            dtype = DTYPES[self.choice.tables]
            gains = Entry("model.memory.gains", dtype, (K, D), partial(_rows, self.weights, GAINS, 0, K))
            return [
                gains,
                *(
                    Entry(
                        f"model.memory.tables.{number}",
                        dtype,
                        (last - first, K, D),
                        partial(_rows, self.weights, TABLES, first, last),
                    )
                    for number, (first, last) in parts
                ),
            ]
        R = self.format.record_bytes
        records = [
            Entry(
                f"model.memory.records_{number}",
                torch.uint8,
                (last - first, R),
                partial(self.records, first, last),
            )
            for number, (first, last) in parts
        ]
        if self.format.basis_shape is None:
            return records
        return [Entry("model.memory.basis", BASIS_DTYPE, self.format.basis_shape, self._basis), *records]

    def finished_rows(self, first: int = 0, last: int | None = None) -> Iterator[Tensor]:
        """Yield M(v) [N, K, D], fp32, of tokens first..last."""
        gains_KD = self.weights.tensor(GAINS)
        for rows_NKD in _rows(self.weights, TABLES, first, self.num_rows if last is None else last):
            yield finished(rows_NKD, gains_KD, self.eps, torch.float32)

    def records(self, first: int, last: int) -> Iterator[Tensor]:
        """Yield records [N, R], uint8, of tokens first..last."""
        for rows_NKD in self.finished_rows(first, last):
            yield self.format.encode(rows_NKD, self.basis, first_row=first)
            first += len(rows_NKD)

    def _basis(self) -> list[Tensor]:
        if self.basis is None:
            raise RuntimeError("the basis of tables=rank is made before anything is written")
        return [self.basis]


def _rows(weights: StoredWeights, name: str, first: int, last: int) -> Iterator[Tensor]:
    step = max(1, CHUNK_ELEMENTS // math.prod(weights.shape(name)[1:]))
    for row in range(first, last, step):
        yield weights.rows(name, row, min(row + step, last))
