"""Writes a shard: an uncompressed webdataset tar whose bytes depend on its content alone.

A sample is `{key}.ends.npy` (uint32: positions just past each document's last token, within the sample) and
`{key}.tokens.npy` (uint16 or uint32). Training reads these by their offsets in the index, in
`tide_mega.data.stream`. This is the only module that imports webdataset.
"""

import hashlib
import io
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from webdataset.writer import TarWriter

from tide_mega.data.index import ShardRecord
from tide_mega.files import atomic_writer

_BLOCK = 512
"""Bytes of a tar header; a member's data is padded to a multiple of this."""


class ShardWriter:
    """Writes samples to a temporary file, which `close` renames to `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stack = ExitStack()
        self._file = _HashingFile(self._stack.enter_context(atomic_writer(path)))
        self._tar = TarWriter(
            self._file, user="tide", group="tide", mode=0o444, mtime=0, compress=False, encoder=False
        )
        self._offset = 0
        self._tokens = 0
        self._documents = 0
        self._samples: list[tuple[int, int]] = []

    def write(self, key: str, tokens: NDArray[np.unsignedinteger], ends: NDArray[np.uint32]) -> None:
        """Append a sample of `tokens` [n] in which documents end at `ends` [documents]."""
        ends_npy, tokens_npy = _npy(ends), _npy(tokens)
        # TarWriter sorts the members of a sample by name: ends first.
        self._tar.write({"__key__": key, "ends.npy": ends_npy, "tokens.npy": tokens_npy})
        self._offset += _member_size(ends_npy)
        header = len(tokens_npy) - tokens.nbytes
        self._samples.append((self._offset + _BLOCK + header, len(tokens)))
        self._offset += _member_size(tokens_npy)
        self._tokens += len(tokens)
        self._documents += len(ends)

    def close(self) -> ShardRecord:
        """Complete the tar and move it into place."""
        self._tar.close()
        self._stack.close()
        return ShardRecord(
            file=self._path.name,
            bytes=self._file.size,
            sha256=self._file.hash.hexdigest(),
            tokens=self._tokens,
            documents=self._documents,
            samples=self._samples,
        )

    def abandon(self, error: BaseException) -> None:
        """Remove the temporary file after `error`."""
        self._stack.__exit__(type(error), error, error.__traceback__)


class _HashingFile:
    """A file for writing that hashes its content."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.hash = hashlib.sha256()
        self.size = 0

    def write(self, content: bytes) -> int:
        self.hash.update(content)
        self.size += len(content)
        return self._file.write(content)


def _npy(array: NDArray[np.generic]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _member_size(content: bytes) -> int:
    return _BLOCK + -(-len(content) // _BLOCK) * _BLOCK
