"""Distinct token types in the steps of a training run, counted on real text.

Shapes: T sequence length, U distinct types of a step.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tide_mega.config.errors import printable, refuse
from tide_mega.data.documents import Document, read_piece
from tide_mega.data.errors import DataError
from tide_mega.data.index import FILE_NAME
from tide_mega.data.inputs import describe_links, find_inputs
from tide_mega.data.lines import MAX_DOCUMENT_BYTES
from tide_mega.data.permutation import Permutation
from tide_mega.data.stream import TokenStream
from tide_mega.data.tokenizer import Tokenizer
from tide_mega.data.units import plan_units

ORDERS = ("shuffled", "contiguous")
_SEED = 1234


@dataclass(frozen=True)
class Sequences:
    """Text as token sequences of one length."""

    count: int
    length: int
    """T."""
    vocab: int
    """One past the largest id the tokenizer has."""
    read: Callable[[int], NDArray[np.int64]]
    """`read(i)` gives the tokens [T] of sequence i."""

    @classmethod
    def cut(cls, ids: NDArray[np.int64], length: int, vocab: int) -> "Sequences":
        """Cuts one long row of ids; a tail shorter than `length` is left out."""
        return cls(len(ids) // length, length, vocab, lambda i: ids[i * length : (i + 1) * length])


@dataclass(frozen=True)
class DistinctTypes:
    """What steps of one size need of the memory."""

    tokens: int
    """Tokens of a step."""
    steps: int
    """Steps measured; they share no sequence."""
    mean: float
    """U, mean over the steps."""
    most: int
    """U, largest."""
    seen_before: float | None
    """Share of a step's types that the step before it had too; None with one step."""
    skew_blocks: float
    """Rows asked of the busiest owner relative to the mean owner, an owner having neighbouring ids."""
    skew_cyclic: float
    """The same where id v belongs to owner v mod n."""


def measure(
    sequences: Sequences,
    tokens: int,
    *,
    owners: int,
    vocab: int,
    order: str = "shuffled",
    most_steps: int = 32,
) -> DistinctTypes:
    """Counts the types in disjoint steps.

    Args:
        sequences: the text.
        tokens: tokens of a step, a multiple of T.
        owners: n, ranks that share the rows.
        vocab: V, rows of a table; `skew_blocks` cuts it in n blocks of ceil(V / n).
        order: shuffled takes sequences as the training loader deals them, contiguous as they lie.
        most_steps: how many steps at most.

    Raises:
        ConfigError: the tables have no row for an id of the text.
        DataError: the text is shorter than a step.
    """
    per_step = tokens // sequences.length
    steps = min(most_steps, sequences.count // per_step)
    if steps == 0:
        raise DataError(
            f"the text has {sequences.count} sequences of {sequences.length} tokens, fewer than the {per_step} "
            f"of a step of {tokens:,} tokens; give more text, or leave {tokens} out of tokens"
        )
    chosen = np.arange(steps * per_step)
    if order == "shuffled":
        chosen = Permutation(sequences.count, _SEED, epoch=0)(chosen)
    types = [
        np.unique(np.concatenate([sequences.read(int(i)) for i in step]))
        for step in chosen.reshape(steps, per_step)
    ]
    asked = np.concatenate(types)
    if (largest := int(asked.max())) >= vocab:
        refuse(
            "vocab", vocab, f"has no row for token id {largest} of the text", f"give at least {largest + 1}"
        )
    seen = [np.isin(now, past).mean() for past, now in itertools.pairwise(types)]
    return DistinctTypes(
        tokens=tokens,
        steps=steps,
        mean=len(asked) / steps,
        most=max(len(ids) for ids in types),
        seen_before=float(np.mean(seen)) if seen else None,
        skew_blocks=_skew(asked // -(-vocab // owners), owners),
        skew_cyclic=_skew(asked % owners, owners),
    )


def _skew(owner_of_request: NDArray[np.int64], owners: int) -> float:
    requests = np.bincount(owner_of_request, minlength=owners)
    return float(requests.max() / requests.mean())


def is_prepared(text: list[str]) -> bool:
    """Whether `text` is one folder that tools/prepare_data.py wrote."""
    return len(text) == 1 and (Path(text[0]) / FILE_NAME).is_file()


def open_prepared(folder: str, length: int) -> Sequences:
    """The training split of a prepared dataset.

    Raises:
        DataError: a shard is bad, or the split is too short.
    """
    stream = TokenStream.open(folder, "train", length)
    return Sequences(len(stream), length, stream.vocab_size, lambda i: stream.window(i)[:length])


def tokenise(
    text: list[str],
    tokenizer: Tokenizer,
    length: int,
    *,
    most_tokens: int,
    suffixes: list[str],
    text_key: str,
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
) -> Sequences:
    """Tokenises text in the order of its files, an EOS after each document, up to `most_tokens`.

    Raises:
        ConfigError: `text` names what does not exist or cannot be read.
        DataError: a file or record is bad.
    """
    parts: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    total = 0
    for document in _documents(text, suffixes, text_key, max_document_bytes):
        parts += [tokenizer.encode_batch([document])[0], np.array([tokenizer.eos_id])]
        total += len(parts[-2]) + 1
        if total >= most_tokens:
            break
    return Sequences.cut(np.concatenate(parts)[:most_tokens], length, tokenizer.vocab_size)


def _documents(text: list[str], suffixes: list[str], text_key: str, longest: int) -> Iterator[str]:
    inputs = find_inputs(text, suffixes)
    if inputs.links:
        print(describe_links(inputs.links), file=sys.stderr)
    for unit in plan_units(inputs.files, 0):
        for piece in unit.pieces:
            for record in read_piece(piece, text_key, lambda count: None, longest):
                if isinstance(record, Document):
                    yield record.text
                elif piece.file.lenient:
                    print(printable(f"left out: {record.source} {record.reason}"), file=sys.stderr)
                else:
                    raise DataError(f"{record.source} {record.reason}. Correct it or leave it out of text")
