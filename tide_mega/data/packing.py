"""Packing documents into the samples and shards of one unit and split.

The token stream is the documents one after the other, each followed by EOS; it is cut into samples of
`sample_tokens` wherever that falls, so a document may go on in the next sample or shard.
"""

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tide_mega.data.errors import DataError
from tide_mega.data.index import SPLITS, ShardRecord
from tide_mega.data.shards import ShardWriter

SHARD_NAME = re.compile(rf"({'|'.join(SPLITS)})-\d{{6,}}-\d{{3,}}\.tar")
"""Names that `SplitWriter` gives."""
_LARGEST_UINT16_VOCAB = 2**16
_LARGEST_UINT32_VOCAB = 2**32


def dtype_for(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """The smallest little-endian type that holds every id of the vocabulary.

    Raises:
        DataError: no supported type does.
    """
    if vocab_size <= _LARGEST_UINT16_VOCAB:
        return np.dtype("<u2")
    if vocab_size <= _LARGEST_UINT32_VOCAB:
        return np.dtype("<u4")
    raise DataError(f"a vocabulary of {vocab_size} does not fit the shards' uint32 tokens")


class SplitWriter:
    """Writes the shards `{split}-{unit}-{number}.tar` of one unit."""

    def __init__(
        self,
        folder: Path,
        split: str,
        unit: int,
        *,
        vocab_size: int,
        eos_id: int,
        sample_tokens: int,
        shard_tokens: int,
        dtype: np.dtype[np.unsignedinteger] | None = None,
    ) -> None:
        self._folder = folder
        self._prefix = f"{split}-{unit:06d}"
        self._vocab_size = vocab_size
        self._eos_id = eos_id
        self._dtype = dtype_for(vocab_size) if dtype is None else dtype
        if vocab_size - 1 > np.iinfo(self._dtype).max:
            raise DataError(f"a vocabulary of {vocab_size} does not fit tokens of type {self._dtype.name}")
        self._samples_per_shard = shard_tokens // sample_tokens
        self._buffer = np.empty(sample_tokens, self._dtype)
        self._filled = 0
        self._ends: list[int] = []
        self._writer: ShardWriter | None = None
        self._samples_in_shard = 0
        self._samples = 0
        self._shards: list[ShardRecord] = []

    def add(self, ids: NDArray[np.int64]) -> None:
        """Appends a document [tokens] and its EOS.

        Raises:
            DataError: an id is outside the vocabulary.
        """
        self._check(ids)
        self._append(ids)
        self._append(np.array([self._eos_id]))
        self._ends.append(self._filled)
        if self._filled == len(self._buffer):
            self._flush()

    def close(self) -> list[ShardRecord]:
        """Writes what is buffered; returns the shards in order, none if there was no document."""
        if self._filled:
            self._flush()
        self._close_shard()
        return self._shards

    def abandon(self, error: BaseException) -> None:
        """Removes the unfinished shard after `error`."""
        if self._writer is not None:
            self._writer.abandon(error)

    def _check(self, ids: NDArray[np.int64]) -> None:
        outside = (ids < 0) | (ids >= self._vocab_size)
        if outside.any():
            raise DataError(
                f"the tokenizer gave id {ids[outside][0]}, outside its vocabulary of {self._vocab_size}; "
                "its file is inconsistent"
            )

    def _append(self, ids: NDArray[np.int64]) -> None:
        """A full sample is flushed only when more tokens come, so an end at its very last token is in it."""
        position = 0
        while position < len(ids):
            if self._filled == len(self._buffer):
                self._flush()
            count = min(len(ids) - position, len(self._buffer) - self._filled)
            self._buffer[self._filled : self._filled + count] = ids[position : position + count]
            self._filled += count
            position += count

    def _flush(self) -> None:
        if self._writer is None:
            self._writer = ShardWriter(self._folder / f"{self._prefix}-{len(self._shards):03d}.tar")
        key = f"{self._prefix}-{self._samples:06d}"
        self._writer.write(key, self._buffer[: self._filled], np.array(self._ends, dtype="<u4"))
        self._samples += 1
        self._samples_in_shard += 1
        self._filled = 0
        self._ends = []
        if self._samples_in_shard == self._samples_per_shard:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._writer is not None:
            self._shards.append(self._writer.close())
            self._writer = None
            self._samples_in_shard = 0
