"""The tokenizer of a prepared dataset: a copy of a given one, or a byte-level BPE trained on the input."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from tide_mega.data.index import DatasetIndex
from tide_mega.data.prepare.documents import Document, read_piece
from tide_mega.data.prepare.inputs import Unit
from tide_mega.data.prepare.options import PrepareOptions, bpe_size
from tide_mega.data.prepare.worker import split_of
from tide_mega.data.tokenizer import EOS_NAMES, Llama3Tokenizer, Tokenizer, find_tokenizer, load_tokenizer
from tide_mega.errors import DataError
from tide_mega.files import sha256_of, write_bytes


def train_bpe(texts: Iterable[str], vocab_size: int) -> str:
    """Train a byte-level BPE and return its tokenizer.json.

    Words are split as in Llama 3. <|endoftext|> (id 0) is the EOS, ids 1 to 256 are the bytes. The same texts
    give the same file. A text too small for `vocab_size` tokens gives fewer.

    Args:
        texts: the documents to train on.
        vocab_size: requested number of tokens, including the EOS.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(Llama3Tokenizer.PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_NAMES[0]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return str(tokenizer.to_str())


_FEWEST_BYTES_READ = 2**20


def dataset_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of a prepared dataset.

    Raises:
        DataError: the dataset's index cannot be read, or the file is not the one that made its tokens.
        ConfigError: the file is not a tokenizer that can be loaded.
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
    """Return the tokenizer file to copy, or None if a BPE is to be trained.

    Raises:
        ConfigError: there is no such file, or it is not a tokenizer.
    """
    if bpe_size(options) is not None:
        return None
    load_tokenizer(options.tokenizer, options.eos_token)  # refuses a bad one before anything is written
    return find_tokenizer(options.tokenizer)


def place_tokenizer(
    source: Path | None, options: PrepareOptions, units: list[Unit], out: Path, log: Callable[[str], None]
) -> Path:
    """Copy or train the tokenizer of `out`, unless an earlier start already did; return its path."""
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
    """Yield texts of the training split for training a BPE, about `bpe_train_bytes` bytes at most.

    Each unit contributes its beginning, with an equal share of the bytes; if the shares would be too small to be
    worth opening files for, only some units, chosen by the seed, contribute.
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
    """Yield training texts from the start of a unit until `limit` bytes are reached."""
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
