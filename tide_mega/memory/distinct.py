"""Counts the distinct token types in training steps on real text, for `tools/memory_plan.py`; and its options.

Dimensions: T tokens of a sequence, U distinct token types of a step, V rows of a table, n owners.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tide_mega.data.index import FILE_NAME
from tide_mega.data.loader import Permutation
from tide_mega.data.prepare.compressed import MAX_DOCUMENT_BYTES
from tide_mega.data.prepare.documents import Document, read_piece
from tide_mega.data.prepare.inputs import describe_links, find_inputs, plan_units
from tide_mega.data.stream import TokenStream
from tide_mega.data.tokenizer import Tokenizer
from tide_mega.errors import DataError, printable, refuse

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
    """`read(i)` returns the tokens [T] of sequence i."""

    @classmethod
    def cut(cls, ids: NDArray[np.int64], length: int, vocab: int) -> "Sequences":
        """Cut one long row of ids; a tail shorter than `length` is dropped."""
        return cls(len(ids) // length, length, vocab, lambda i: ids[i * length : (i + 1) * length])


@dataclass(frozen=True)
class DistinctTypes:
    """The demand that steps of one size make on the memory."""

    tokens: int
    """Tokens of a step."""
    steps: int
    """Number of steps measured; they share no sequence."""
    mean: float
    """Mean of U over the steps."""
    most: int
    """Largest U."""
    seen_before: float | None
    """Share of a step's types that also occurred in the previous step; None with one step."""
    skew_blocks: float
    """Rows requested from the busiest owner over the mean, if owners hold contiguous ids."""
    skew_cyclic: float
    """The same if id v belongs to owner v mod n."""


def measure(
    sequences: Sequences,
    tokens: int,
    *,
    owners: int,
    vocab: int,
    order: str = "shuffled",
    most_steps: int = 32,
) -> DistinctTypes:
    """Count the distinct types in disjoint steps.

    Args:
        sequences: the text.
        tokens: tokens of a step, a multiple of T.
        owners: n, ranks that share the rows.
        vocab: V, rows of a table; `skew_blocks` cuts it in n blocks of ceil(V / n).
        order: shuffled (as the training loader orders sequences) or contiguous.
        most_steps: maximum number of steps.

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
    """Return whether `text` is a single folder written by tools/prepare_data.py."""
    return len(text) == 1 and (Path(text[0]) / FILE_NAME).is_file()


def open_prepared(folder: str, length: int) -> Sequences:
    """Open the training split of a prepared dataset.

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
    """Tokenise text in the order of its files, with EOS after each document, up to `most_tokens`.

    Raises:
        ConfigError: `text` names something that does not exist or cannot be read.
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


_AT_LEAST_ONE = (
    *("max_document_bytes", "max_tokens", "seq_length", "most_steps", "width", "tensor", "data", "pipeline"),
    *("micro_batch", "in_flight"),
)


@dataclass
class PlanOptions:
    """Options of `tools/memory_plan.py`."""

    text: list[str] = field(default_factory=lambda: ["stdlib"])
    """Files or folders that tools/prepare_data.py reads; `stdlib`; or one folder that it wrote, whose training
    split is read as it was tokenised."""
    tokenizer: str | None = None
    """A tokenizer.json or a Llama-3 tokenizer.model; null takes the one in the installed package
    llama_models."""
    suffixes: list[str] = field(default_factory=list)
    """Further file suffixes read as plain text, e.g. [.py,.rst]."""
    text_key: str = "text"
    """Key of a JSON line, or column of a parquet file, that holds the text."""
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    """Most bytes of one document, decompressed; a longer one is refused."""
    max_tokens: int = 4_000_000
    """Text is tokenised up to there."""
    tokens: list[int] = field(default_factory=lambda: [2048, 8192, 32768, 65536])
    """Tokens a data-parallel rank reads in an optimizer step, all its micro-batches together."""
    seq_length: int = 2048
    order: str = "shuffled"
    """How sequences make a step: shuffled, as the training loader deals them, or contiguous."""
    most_steps: int = 32
    """Most steps measured for each number of tokens; they share no text."""
    blocks: list[int] = field(default_factory=lambda: [8, 24])
    """Values of K."""
    width: int = 2048
    vocab: int | None = None
    """Rows of a table; null means the tokenizer's vocabulary."""
    tensor: int = 1
    data: int = 32
    """Data-parallel ranks; at 32, ranks of 32,768 tokens make the 1B runs' steps of 1,048,576."""
    pipeline: int = 1
    sequence_parallel: bool = False
    gigabits: float = 400.0
    """Rate of a rank's link in 10^9 bit/s, each way; what leaves a replica is timed at it."""
    micro_batch: int = 8
    """Sequences of a microbatch, for the memory of the plain approach."""
    in_flight: int = 1
    """Microbatches whose M the plain approach holds at a time: up to `pipeline` under 1F1B."""
    memory_tokens: int = 32768
    """Tokens of the step whose rows the table of memory counts; one of `tokens`."""
    out: str | None = None
    """JSON file to write with all the figures, bytes by kind too."""


def validate_plan_options(options: PlanOptions) -> None:
    """Check each option, and those that depend on each other.

    Raises:
        ConfigError: naming the option, its value and a valid one.
    """
    for name in _AT_LEAST_ONE:
        if getattr(options, name) < 1:
            refuse(name, getattr(options, name), "is too small", "give at least 1")
    if options.gigabits <= 0:
        refuse("gigabits", options.gigabits, "is no rate", "give a positive number, e.g. 400")
    if options.order not in ORDERS:
        refuse("order", options.order, "is unknown", f"use {' or '.join(ORDERS)}")
    for name in ("tokens", "blocks"):
        if min(getattr(options, name), default=0) < 1:
            refuse(name, getattr(options, name), "leaves nothing to plan", "list numbers of at least 1")
    for tokens in options.tokens:
        if tokens % options.seq_length:
            multiple = f"give multiples of seq_length={options.seq_length}"
            refuse("tokens", tokens, "is no whole number of sequences", multiple)
    if options.memory_tokens not in options.tokens:
        one_of = ", ".join(map(str, options.tokens))
        refuse("memory_tokens", options.memory_tokens, "is not among tokens", f"use one of {one_of}")
    if options.out is not None and not Path(options.out).absolute().parent.is_dir():
        refuse("out", options.out, "lies in a folder that does not exist", "make the folder first")
