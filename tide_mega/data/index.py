"""The index of a prepared dataset: `index.json`, written last, so that a folder that has one is complete.

It may name only regular files beside it, so that an index from elsewhere cannot lead outside its folder.
"""

import contextlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tide_mega.errors import DataError
from tide_mega.files import fingerprint_of, parse_json, plain_name, regular_file, write_json

FILE_NAME = "index.json"
FORMAT = "tide_mega.tokens"
VERSION = 1
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class ShardRecord:
    """One tar file."""

    file: str
    bytes: int
    sha256: str
    tokens: int
    documents: int
    """Documents that end in the shard."""
    samples: list[tuple[int, int]]
    """(byte offset in the file of the sample's first token, its number of tokens)."""


@dataclass(frozen=True)
class SplitRecord:
    """The shards of a split, whose token stream is their concatenation in this order."""

    tokens: int
    documents: int
    shards: list[ShardRecord]


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer that made the tokens; its file lies beside the index."""

    file: str
    fingerprint: str
    vocab_size: int
    eos_id: int


@dataclass(frozen=True)
class Totals:
    """Statistics of the input."""

    documents: int
    """Documents written, in both splits."""
    tokens: int
    empty_documents: int
    """Documents without text or without a token, which are not written."""
    empty_files: int
    """Files without a byte, a line or a row."""
    bad: int
    """Files or records left out because they could not be read."""
    tolerated: int
    """The number of these that are left out even with on_bad_file=fail (files of `stdlib`)."""
    ignored_files: dict[str, int]
    """Files in input folders that are not read, counted by suffix; also hidden files, and folders linked twice."""


@dataclass(frozen=True)
class DatasetIndex:
    """All of `index.json`."""

    tokenizer: TokenizerRecord
    dtype: str
    """numpy name of the tokens' dtype: uint16 or uint32, little-endian."""
    splits: dict[str, SplitRecord]
    totals: Totals
    bad: list[dict[str, str]] = field(default_factory=list)
    """The first bad files or records, each with source and reason."""
    empty_files: list[str] = field(default_factory=list)
    """The first empty files."""
    options: dict[str, Any] = field(default_factory=dict)
    """The options on which the dataset depends."""

    @property
    def fingerprint(self) -> str:
        """Fingerprint of tokenizer and tokens, independent of the dataset's location."""
        shards = {name: [shard.sha256 for shard in split.shards] for name, split in self.splits.items()}
        return fingerprint_of([self.tokenizer.fingerprint, shards])

    def save(self, folder: Path) -> None:
        """Write `folder/index.json` atomically."""
        write_json(folder / FILE_NAME, {"format": FORMAT, "version": VERSION, **asdict(self)})

    @classmethod
    def load(cls, folder: Path | str) -> "DatasetIndex":
        """Read `folder/index.json`.

        Raises:
            DataError: it is missing or damaged, of a format that this version does not read, or names files
                outside the folder.
        """
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            raise DataError(
                f"{folder} is no prepared dataset: it has no {FILE_NAME}; "
                f"run tools/prepare_data.py with out={folder} (it continues an interrupted preparation)"
            )
        try:
            content = parse_json(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT or content["version"] != VERSION:
                raise DataError(
                    f"{path} is of format {content['format']} version {content['version']}, but this version "
                    f"reads {FORMAT} version {VERSION}; prepare the data again"
                )
            tokenizer = TokenizerRecord(**content["tokenizer"])
            with contextlib.suppress(FileNotFoundError):
                regular_file(Path(folder), tokenizer.file)
            return cls(
                tokenizer=tokenizer,
                dtype=content["dtype"],
                splits={name: _split(value) for name, value in content["splits"].items()},
                totals=Totals(**content["totals"]),
                bad=content["bad"],
                empty_files=content["empty_files"],
                options=content["options"],
            )
        except DataError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path} is damaged ({type(error).__name__}: {error}); prepare the data again"
            ) from error


def shard_from_json(value: dict[str, Any]) -> ShardRecord:
    """Return a `ShardRecord` from its JSON.

    Raises:
        ValueError: the file name is not a plain name.
    """
    samples = [(int(offset), int(n)) for offset, n in value["samples"]]
    return ShardRecord(**{**value, "file": plain_name(value["file"]), "samples": samples})


def _split(value: dict[str, Any]) -> SplitRecord:
    shards = [shard_from_json(shard) for shard in value["shards"]]
    return SplitRecord(value["tokens"], value["documents"], shards)
