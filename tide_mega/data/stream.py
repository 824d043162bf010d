"""Reads a prepared split as one long row of tokens.

Windows of T + 1 tokens may span samples and shards. Shards are read with positioned reads and not memory-mapped:
if a shard is truncated or its disk fails during training, a read raises an error, whereas a map would kill the
process with SIGBUS.

Dimensions: T is the sequence length.
"""

import logging
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from tide_mega.config.schema import DataConfig
from tide_mega.data.index import DatasetIndex, ShardRecord
from tide_mega.errors import ConfigError, DataError, UnreadableShardError
from tide_mega.files import fingerprint_of, regular_file, sha256_of

_OPEN_SHARDS = 256
"""Maximum number of open shards."""


class TokenStream:
    """The tokens of a split, in the order of its shards; `window(i)` reads T + 1 of them.

    A skipped shard keeps its place: the tokens of window `i` depend on the dataset alone, and not on which
    shards are readable at present.
    """

    def __init__(
        self,
        folder: Path,
        index: DatasetIndex,
        split: str,
        shards: list[ShardRecord],
        seq_length: int,
        *,
        skips_bad: bool = False,
        bad: Mapping[str, str] | None = None,
    ) -> None:
        """Use `open` instead. Reads the `shards` of `folder` except those in `bad`, a map from file to reason."""
        self._bad = dict(bad or {})
        self.skips_bad = skips_bad
        """Whether an unreadable window is left out instead of ending the run."""
        self.split = split
        self.seq_length = seq_length
        self.eos_id = index.tokenizer.eos_id
        self.vocab_size = index.tokenizer.vocab_size
        self._folder = folder
        self._dtype = np.dtype(index.dtype).newbyteorder("<")
        self._files = [shard.file for shard in shards]
        samples = [(i, offset, n) for i, shard in enumerate(shards) for offset, n in shard.samples]
        self._shard_of_sample = np.array([i for i, _, _ in samples], np.int32)
        self._offset_of_sample = np.array([offset for _, offset, _ in samples], np.int64)
        # Position in the stream of each sample's first token, and the stream's end.
        self._starts = np.concatenate([[0], np.cumsum([n for _, _, n in samples], dtype=np.int64)])
        self._open: OrderedDict[int, BinaryIO] = OrderedDict()
        self.fingerprint = fingerprint_of(
            [index.tokenizer.fingerprint, split, seq_length, [shard.sha256 for shard in shards]]
        )
        """Fingerprint of the dataset, including skipped shards: equal fingerprints mean equal windows."""
        self.skipped_tokens = sum(shard.tokens for shard in shards if shard.file in self._bad)
        """Tokens in skipped shards."""

    @classmethod
    def of_run(
        cls,
        data: DataConfig,
        split: str,
        *,
        folder: Path | str | None = None,
        logger: logging.Logger | None = None,
    ) -> "TokenStream":
        """Open a split as the run with this configuration does; `folder` is the present location of its dataset.

        Raises:
            ConfigError, DataError: as in `open`.
        """
        return cls.open(
            folder or data.path,
            split,
            data.seq_length,
            verify=data.verify,
            on_bad_shard=data.on_bad_shard,
            logger=logger,
        )

    @classmethod
    def open(
        cls,
        path: Path | str,
        split: str,
        seq_length: int,
        verify: str = "size",
        on_bad_shard: str = "fail",
        logger: logging.Logger | None = None,
    ) -> "TokenStream":
        """Open a split of the dataset in the folder `path`.

        Args:
            path: a folder written by `tools/prepare_data.py`.
            split: train or validation.
            seq_length: T.
            verify: how each shard is checked first: size, or checksum (reads all of it).
            on_bad_shard: fail or skip. With skip, a bad shard is named in a warning, and reading one of its
                windows, or one of a shard that goes bad later, raises an error.
            logger: receives the warnings.

        Raises:
            ConfigError: an argument has an unknown value.
            DataError: the folder is not a prepared dataset, a shard is bad, or the split has fewer than two
                tokens.
        """
        for name, value, allowed in (
            ("verify", verify, ("size", "checksum")),
            ("on_bad_shard", on_bad_shard, ("fail", "skip")),
        ):
            if value not in allowed:
                raise ConfigError(f"data.{name}={value} is unknown; use {' or '.join(allowed)}")
        if seq_length < 1:
            raise ConfigError(f"data.seq_length={seq_length} must be at least 1")
        folder = Path(path)
        index = DatasetIndex.load(folder)
        if split not in index.splits:
            raise DataError(f"{folder} has no split {split!r}; it has {', '.join(index.splits)}")
        logger = logger or logging.getLogger(__name__)
        shards = index.splits[split].shards
        bad: dict[str, str] = {}
        for shard in shards:
            problem = check_shard(folder, shard, verify)
            if problem is None:
                continue
            bad[shard.file] = problem
            if on_bad_shard == "skip":
                logger.warning(
                    "shard %s %s: skipped, %s tokens left out",
                    folder / shard.file,
                    problem,
                    f"{shard.tokens:,}",
                )
            else:
                raise DataError(
                    f"shard {folder / shard.file} {problem}; copy it again or prepare the data again, or "
                    "train with data.on_bad_shard=skip to go on without it"
                )
        stream = cls(folder, index, split, shards, seq_length, skips_bad=on_bad_shard == "skip", bad=bad)
        if (readable := stream.num_tokens - stream.skipped_tokens) < 2:
            raise DataError(
                f"the {split} split of {folder} holds {readable} readable tokens, and one "
                "prediction needs two; prepare more text"
                + (" or a larger validation_fraction" if split == "validation" else "")
            )
        return stream

    @property
    def num_tokens(self) -> int:
        """Tokens in the stream, including those of skipped shards."""
        return int(self._starts[-1])

    @property
    def bad_shards(self) -> list[str]:
        """File names of the skipped shards, in the order of the stream."""
        return list(self._bad)

    def __len__(self) -> int:
        """Return the number of whole windows; window i holds tokens i T … (i + 1) T, so neighbours share one."""
        return (self.num_tokens - 1) // self.seq_length

    def window(self, i: int) -> NDArray[np.int64]:
        """Return the tokens of window `i` [T + 1]; the last, at i = len(self), may be shorter.

        Raises:
            IndexError: window `i` has no token to predict.
            UnreadableShardError: a shard of it is skipped, or has become unreadable.
        """
        start = i * self.seq_length
        if not 0 <= start < self.num_tokens - 1:
            raise IndexError(f"window {i} of a stream of {len(self)}")
        return self.tokens(start, min(start + self.seq_length + 1, self.num_tokens))

    def tokens(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the tokens at positions start … stop - 1 of the stream [stop - start].

        Raises:
            UnreadableShardError: a shard is skipped, or has become unreadable.
        """
        out = np.empty(stop - start, np.int64)
        sample = bisect_right(self._starts, start) - 1
        filled = 0
        while filled < len(out):
            inside = start + filled - int(self._starts[sample])
            count = min(len(out) - filled, int(self._starts[sample + 1]) - start - filled)
            first = int(self._offset_of_sample[sample]) + inside * self._dtype.itemsize
            raw = self._read(int(self._shard_of_sample[sample]), first, count * self._dtype.itemsize)
            out[filled : filled + count] = np.frombuffer(raw, self._dtype)
            filled += count
            sample += 1
        return out

    def _read(self, shard: int, first: int, size: int) -> bytes:
        file = self._files[shard]
        if file in self._bad:
            raise UnreadableShardError(f"shard {self._folder / file} {self._bad[file]}", file)
        raw = b""
        try:
            descriptor = self._file(shard).fileno()
            while len(raw) < size and (more := os.pread(descriptor, size - len(raw), first + len(raw))):
                raw += more
        except OSError as error:
            self._forget(shard)
            raise self._unreadable(file, error.strerror or str(error)) from error
        if len(raw) < size:
            self._forget(shard)
            raise self._unreadable(file, f"it ends at byte {first + len(raw):,}")
        return raw

    def _file(self, shard: int) -> BinaryIO:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) == _OPEN_SHARDS:
            self._open.popitem(last=False)[1].close()
        self._open[shard] = (self._folder / self._files[shard]).open("rb", buffering=0)
        return self._open[shard]

    def _unreadable(self, file: str, why: str) -> UnreadableShardError:
        return UnreadableShardError(
            f"shard {self._folder / file} can no longer be read ({why}); bring it back and start again, or "
            "train with data.on_bad_shard=skip to go on without what cannot be read",
            file,
        )

    def _forget(self, shard: int) -> None:
        if shard in self._open:
            self._open.pop(shard).close()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without open files, which another process opens itself."""
        return {**self.__dict__, "_open": OrderedDict()}


def check_shard(folder: Path, shard: ShardRecord, verify: str) -> str | None:
    """Return what is wrong with a shard, as the end of a sentence, or None.

    Args:
        folder: of the dataset.
        shard: its record in the index.
        verify: size or checksum.
    """
    path = folder / shard.file
    try:
        size = regular_file(folder, shard.file).stat().st_size
        if size != shard.bytes:
            kind = "truncated" if size < shard.bytes else "altered"
            return f"is {kind}: it has {size:,} bytes, and the index says {shard.bytes:,}"
        if verify == "checksum" and sha256_of(path) != shard.sha256:
            return "is altered: its SHA-256 is not the one in the index"
    except FileNotFoundError:
        return "is missing"
    except ValueError:
        return "is a link, or no file: only regular files in the dataset's own folder are read"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    return None
