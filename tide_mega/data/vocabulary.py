"""The tokenizer of a prepared dataset: a copy of a given one, or a BPE trained on the input."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tide_mega.data.atomic import sha256_of, write_bytes
from tide_mega.data.bpe import train_bpe
from tide_mega.data.documents import Document, read_piece
from tide_mega.data.errors import DataError
from tide_mega.data.index import DatasetIndex
from tide_mega.data.options import PrepareOptions, bpe_size
from tide_mega.data.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from tide_mega.data.units import Unit
from tide_mega.data.worker import split_of

_FEWEST_BYTES_READ = 2**20


def dataset_tokenizer(folder: Path) -> Tokenizer:
    """Loads the tokenizer of a prepared dataset.

    Raises:
        DataError: the dataset's index cannot be read, or the file is another than the one that made its tokens.
        ConfigError: the file is no tokenizer that can be loaded.
    """
    index = DatasetIndex.load(folder)
    tokenizer = load_tokenizer(folder / index.tokenizer.file, index.options.get("eos_token"))
    recorded = index.tokenizer
    if (tokenizer.fingerprint, tokenizer.vocab_size) != (recorded.fingerprint, recorded.vocab_size):
        raise DataError(
            f"{folder / recorded.file} is not the tokenizer that made the tokens beside it: put that one back, or "
            "prepare the data again."
        )
    return tokenizer


def tokenizer_source(options: PrepareOptions) -> Path | None:
    """The file to copy, or None when a BPE is to be trained.

    Raises:
        ConfigError: there is no such file or it is no tokenizer.
    """
    if bpe_size(options) is not None:
        return None
    load_tokenizer(options.tokenizer, options.eos_token)  # refuse a bad one before anything is written
    return find_tokenizer(options.tokenizer)


def place_tokenizer(
    source: Path | None, options: PrepareOptions, units: list[Unit], out: Path, log: Callable[[str], None]
) -> Path:
    """Copies or trains the tokenizer of `out`, unless an earlier run of this preparation did; its path."""
    if source is not None:
        path = out / f"tokenizer{source.suffix}"
        if not path.is_file() or sha256_of(path) != sha256_of(source):
            write_bytes(path, source.read_bytes())
        return path
    path = out / "tokenizer.json"
    size = bpe_size(options)
    if size is not None and not path.is_file():
        log(f"training a byte-level BPE of {size:,} tokens")
        write_bytes(path, train_bpe(training_sample(units, options), size).encode())
    return path


def training_sample(units: list[Unit], options: PrepareOptions) -> Iterator[str]:
    """Texts of the training split to train a BPE on, at most about `bpe_train_bytes` bytes.

    Each unit gives its beginning, an equal share of the bytes; where the shares would be too small to be
    worth opening a file for, fewer units do, chosen by the seed.
    """
    budget = options.bpe_train_bytes
    share = budget // max(len(units), 1)
    order = list(range(len(units)))
    if share < _FEWEST_BYTES_READ:
        share = _FEWEST_BYTES_READ
        order = np.random.default_rng(options.seed).permutation(len(units)).tolist()
    for i in order:
        for text in _beginning(units[i], options, min(share, budget)):
            budget -= len(text.encode())
            yield text
        if budget <= 0:
            return


def _beginning(unit: Unit, options: PrepareOptions, limit: int) -> Iterator[str]:
    """Training texts from the start of a unit until `limit` bytes are reached."""
    size = 0
    for piece in unit.pieces:
        records = read_piece(piece, options.text_key, lambda count: None, options.max_document_bytes)
        for record in records:
            if not isinstance(record, Document) or not record.text:
                continue
            if split_of(record.text, options.seed, options.validation_fraction) == "train":
                yield record.text
            size += len(record.text.encode())
            if size >= limit:
                return
