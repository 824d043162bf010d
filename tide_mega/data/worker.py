"""Tokenising one unit of work into its own shards; what each process of the preparation runs."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tide_mega.config.stored import parse_json
from tide_mega.data.atomic import atomic_writer, write_json
from tide_mega.data.documents import BadRecord, read_piece
from tide_mega.data.errors import DataError
from tide_mega.data.index import SPLITS, ShardRecord, shard_from_json
from tide_mega.data.packing import SplitWriter
from tide_mega.data.tokenizer import Tokenizer
from tide_mega.data.units import Unit

UNITS_FOLDER = "units"
UNIT_FILE = re.compile(r"\d{6,}\.(json|counts\.npy)")
"""Names in it."""
LISTED = 100
"""How many bad records or empty files are named; the rest are counted."""
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
    """What a unit came to; `units/{number}.json`, beside the counts in `units/{number}.counts.npy`."""

    fingerprint: str
    splits: dict[str, list[ShardRecord]] = field(default_factory=dict)
    empty_documents: int = 0
    bad_count: int = 0
    bad_strict: int = 0
    """Bad records that `on_bad_file=fail` would not have let pass."""
    bad: list[dict[str, str]] = field(default_factory=list)
    empty_files: list[str] = field(default_factory=list)
    """Names of files with blank lines or no rows alone."""

    def save(self, out: Path, number: int) -> None:
        """Writes the record; its presence says that the unit is done."""
        write_json(record_path(out, number), asdict(self))

    @classmethod
    def load(cls, out: Path, number: int) -> "UnitResult | None":
        """Reads a record, or None when there is none, or none that can be read: the unit is then done again."""
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
    """Where the record of unit `number` lies."""
    return out / UNITS_FOLDER / f"{number:06d}.json"


def counts_path(out: Path, number: int) -> Path:
    """Where the token counts of unit `number` lie: uint64 [2, types seen], ids and counts."""
    return out / UNITS_FOLDER / f"{number:06d}.counts.npy"


def process_unit(
    unit: Unit, job: Job, tokenizer: Tokenizer, fingerprint: str, on_bytes: Callable[[int], None]
) -> None:
    """Tokenises a unit; writes its shards, its counts (training split) and, last, its record.

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
    """The split of a document: a function of its text and the seed, so equal documents stay together."""
    digest = blake2b(text.encode("utf-8"), digest_size=8, key=str(seed).encode()).digest()
    return "validation" if int.from_bytes(digest, "big") < validation_fraction * 2**64 else "train"
