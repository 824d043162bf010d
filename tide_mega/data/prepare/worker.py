"""One unit of work: its documents are tokenised and packed into samples and shards of its own, by one process.

The token stream is the concatenation of the documents, each followed by EOS. It is cut into samples of
`sample_tokens` wherever that falls, so a document may continue in the next sample or shard.
"""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tide_mega.data.index import SPLITS, ShardRecord, shard_from_json
from tide_mega.data.prepare.documents import BadRecord, read_piece
from tide_mega.data.prepare.inputs import Unit
from tide_mega.data.prepare.shards import ShardWriter
from tide_mega.data.tokenizer import Tokenizer
from tide_mega.errors import DataError
from tide_mega.files import atomic_writer, parse_json, write_json

SHARD_NAME = re.compile(rf"({'|'.join(SPLITS)})-\d{{6,}}-\d{{3,}}\.tar")
"""Pattern of the file names that `SplitWriter` uses."""
_LARGEST_UINT16_VOCAB = 2**16
_LARGEST_UINT32_VOCAB = 2**32

UNITS_FOLDER = "units"
LISTED = 100
"""Maximum number of bad records or empty files that are listed; the others are only counted."""


def dtype_for(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """Return the smallest little-endian dtype that holds every id of the vocabulary.

    Raises:
        DataError: no supported dtype does.
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
        """Append a document [tokens] and its EOS.

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
        """Write what is buffered; return the shards in order, none if there was no document."""
        if self._filled:
            self._flush()
        self._close_shard()
        return self._shards

    def abandon(self, error: BaseException) -> None:
        """Remove the unfinished shard after `error`."""
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
        """Append tokens; a full sample is flushed only with the next token, to include an end at its last one."""
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


UNIT_FILE = re.compile(r"\d{6,}\.(json|counts\.npy)")
"""Pattern of the file names in `UNITS_FOLDER`."""
_BATCH_CHARACTERS = 2**20


@dataclass(frozen=True)
class Job:
    """What every unit of a preparation has in common."""

    out: str
    text_key: str
    max_document_bytes: int
    validation_fraction: float
    seed: int
    sample_tokens: int
    shard_tokens: int
    skip_bad: bool


@dataclass
class UnitResult:
    """The result of a unit: `units/{number}.json`, beside the counts in `units/{number}.counts.npy`."""

    fingerprint: str
    splits: dict[str, list[ShardRecord]] = field(default_factory=dict)
    empty_documents: int = 0
    bad_count: int = 0
    bad_strict: int = 0
    """Number of bad records that `on_bad_file=fail` would have refused."""
    bad: list[dict[str, str]] = field(default_factory=list)
    empty_files: list[str] = field(default_factory=list)
    """Names of files that have only blank lines, or no rows."""

    def save(self, out: Path, number: int) -> None:
        """Write the record; its presence marks the unit as done."""
        write_json(record_path(out, number), asdict(self))

    @classmethod
    def load(cls, out: Path, number: int) -> "UnitResult | None":
        """Read a record; return None if it is missing or unreadable, and the unit must be processed again."""
        path = record_path(out, number)
        if not path.is_file():
            return None
        try:
            content: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
            splits = {
                name: [shard_from_json(shard) for shard in shards]
                for name, shards in content["splits"].items()
            }
            return cls(**{**content, "splits": splits})
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


def record_path(out: Path, number: int) -> Path:
    """Return the path of the record of unit `number`."""
    return out / UNITS_FOLDER / f"{number:06d}.json"


def counts_path(out: Path, number: int) -> Path:
    """Return the path of the token counts of unit `number`: uint64 [2, types seen], ids and counts."""
    return out / UNITS_FOLDER / f"{number:06d}.counts.npy"


def process_unit(
    unit: Unit, job: Job, tokenizer: Tokenizer, fingerprint: str, on_bytes: Callable[[int], None]
) -> None:
    """Tokenise a unit and write its shards, its counts (training split) and, last, its record.

    Raises:
        DataError: a bad file or record, unless the job skips them.
    """
    out = Path(job.out)
    writers = {
        split: SplitWriter(
            out,
            split,
            unit.number,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            sample_tokens=job.sample_tokens,
            shard_tokens=job.shard_tokens,
        )
        for split in SPLITS
    }
    result = UnitResult(fingerprint)
    counts = np.zeros(tokenizer.vocab_size, np.uint64)
    try:
        _read(unit, job, tokenizer, writers, counts, result, on_bytes)
        result.splits = {split: writer.close() for split, writer in writers.items()}
    except BaseException as error:
        for writer in writers.values():
            writer.abandon(error)
        raise
    ids = np.flatnonzero(counts)
    with atomic_writer(counts_path(out, unit.number)) as file:
        np.save(file, np.stack([ids.astype(np.uint64), counts[ids]]), allow_pickle=False)
    result.save(out, unit.number)


def _read(
    unit: Unit,
    job: Job,
    tokenizer: Tokenizer,
    writers: dict[str, SplitWriter],
    counts: NDArray[np.uint64],
    result: UnitResult,
    on_bytes: Callable[[int], None],
) -> None:
    texts: list[str] = []
    characters = 0

    def flush() -> None:
        nonlocal characters
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            if not len(ids):
                result.empty_documents += 1
                continue
            split = split_of(text, job.seed, job.validation_fraction)
            writers[split].add(ids)
            if split == "train":
                counts[:] += np.bincount(ids, minlength=len(counts)).astype(np.uint64)
                counts[tokenizer.eos_id] += np.uint64(1)
        texts.clear()
        characters = 0

    for piece in unit.pieces:
        has_records = False
        for record in read_piece(piece, job.text_key, on_bytes, job.max_document_bytes):
            has_records = True
            if isinstance(record, BadRecord):
                _note_bad(record, result, skip=job.skip_bad or piece.file.lenient, lenient=piece.file.lenient)
            elif not record.text:
                result.empty_documents += 1
            else:
                texts.append(record.text)
                characters += len(record.text)
                if characters >= _BATCH_CHARACTERS:
                    flush()
        if not has_records and piece.is_whole:
            result.empty_files.append(piece.file.name)
    flush()


def _note_bad(record: BadRecord, result: UnitResult, *, skip: bool, lenient: bool) -> None:
    if not skip:
        raise DataError(
            f"{record.source} {record.reason}. Correct or remove it, or pass on_bad_file=skip to leave bad "
            "files and records out (they are counted and named in index.json)"
        )
    result.bad_count += 1
    result.bad_strict += not lenient
    if len(result.bad) < LISTED:
        result.bad.append({"source": record.source, "reason": record.reason})


def split_of(text: str, seed: int, validation_fraction: float) -> str:
    """Return the split of a document: a function of its text and the seed, so equal documents stay together."""
    digest = blake2b(text.encode("utf-8"), digest_size=8, key=str(seed).encode()).digest()
    return "validation" if int.from_bytes(digest, "big") < validation_fraction * 2**64 else "train"
