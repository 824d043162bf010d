"""Text files as batches for scoring, in which every token but the first is predicted exactly once.

Window i holds the tokens i T … (i + 1) T, so neighbours share one token, and a token's context is what precedes
it in its window. Dimensions: N tokens, B sequences, T tokens of a sequence.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tide_mega.data.loader import IGNORE_LABEL, TokenBatch
from tide_mega.data.prepare.compressed import MAX_DOCUMENT_BYTES
from tide_mega.data.prepare.documents import BadRecord, read_piece
from tide_mega.data.prepare.inputs import InputFile, Piece, kinds_by_suffix, suffix_of
from tide_mega.data.tokenizer import Tokenizer
from tide_mega.errors import ConfigError, DataError

TEXT_KEY = "text"
"""Key of a JSON line, and column of a parquet file, with the text."""
_KINDS = kinds_by_suffix()
_CHARACTERS_PER_TOKEN, _MARGIN_TOKENS = 8, 64


def text_name(path: Path | str) -> str:
    """Return the name under which results of a text file are reported: its file name without suffix."""
    name = Path(path).name
    suffix = suffix_of(name, _KINDS)
    return Path(path).stem if suffix is None else name[: -len(suffix)] or name


@dataclass(frozen=True)
class TextSet:
    """A tokenised text."""

    name: str
    ids_N: NDArray[np.int64]
    num_bytes: int
    """UTF-8 bytes of the tokens after the first, that is of those predicted."""
    eos_id: int

    @classmethod
    def load(
        cls,
        path: Path | str,
        tokenizer: Tokenizer,
        *,
        max_tokens: int = 0,
        max_document_bytes: int = MAX_DOCUMENT_BYTES,
        vocab_size: int | None = None,
    ) -> "TextSet":
        """Read a UTF-8 text as one document; JSON lines and parquet (key `text`) as documents separated by EOS.

        Suffixes are those of data preparation; any other is read as plain text.

        Args:
            path: the file.
            tokenizer: the model's.
            max_tokens: tokens taken from the beginning; 0 takes all.
            max_document_bytes: a document that is longer, decompressed, is refused.
            vocab_size: the model's, if the ids are to be checked.

        Raises:
            ConfigError: there is no such file.
            DataError: it is not a valid text, has fewer than two tokens, or has ids that the model lacks.
        """
        path = Path(path)
        if not path.is_file():
            raise ConfigError(f"the text {path} is not a file: give one that is, or leave it out.")
        ids: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
        widths: list[NDArray[np.float64]] = [np.empty(0)]
        count = 0
        for text in _documents(path, max_document_bytes):
            if count > 0:
                ids.append(np.array([tokenizer.eos_id], np.int64))
                widths.append(np.zeros(1))
            ids_of_text, widths_of_text = _encode(text, tokenizer, max_tokens - count if max_tokens else None)
            ids.append(ids_of_text)
            widths.append(widths_of_text)
            count += len(ids[-1]) + (count > 0)
            if 0 < max_tokens <= count:
                break
        ids_N = np.concatenate(ids)[: max_tokens or None]
        widths_N = np.concatenate(widths)[: max_tokens or None]
        if len(ids_N) < 2:
            raise DataError(
                f"the text {path} comes to {len(ids_N)} tokens, and one prediction needs two: give more text."
            )
        if vocab_size is not None and (largest := int(ids_N.max())) >= vocab_size:
            raise DataError(
                f"the text {path} has token id {largest}, and the model's vocabulary has {vocab_size}: "
                "give the tokenizer that the model was trained with."
            )
        return cls(text_name(path), ids_N, round(float(widths_N[1:].sum())), tokenizer.eos_id)

    @property
    def num_scored(self) -> int:
        """Number of predicted tokens: all but the first."""
        return len(self.ids_N) - 1

    def batches(
        self, seq_length: int, micro_batch_size: int, *, dp_rank: int = 0, dp_size: int = 1
    ) -> Iterator[TokenBatch]:
        """Yield the micro-batches [B, T] of one data-parallel rank; over all ranks each window occurs once.

        Every rank gets the same number; the end of the last window and the rows after it are EOS without labels.
        """
        windows = -(-self.num_scored // seq_length)
        rows = dp_size * micro_batch_size
        for start in range(0, -(-windows // rows) * rows, rows):
            first = start + dp_rank * micro_batch_size
            shape = (micro_batch_size, seq_length)
            tokens_BT = torch.full(shape, self.eos_id, dtype=torch.int64)
            labels_BT = torch.full(shape, IGNORE_LABEL, dtype=torch.int64)
            for row, i in enumerate(range(first, min(first + micro_batch_size, windows))):
                window = torch.from_numpy(self.ids_N[i * seq_length : (i + 1) * seq_length + 1])
                tokens_BT[row, : len(window) - 1] = window[:-1]
                labels_BT[row, : len(window) - 1] = window[1:]
            yield TokenBatch(tokens_BT, labels_BT)


def load_texts(
    paths: Sequence[str],
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    key: str,
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
    vocab_size: int | None = None,
) -> list[TextSet]:
    """Load the texts that the option `key` lists; see `TextSet.load`.

    Raises:
        ConfigError: as in `TextSet.load`, or two texts have the same name.
        DataError: as in `TextSet.load`.
    """
    texts: dict[str, TextSet] = {}
    for path in paths:
        if not Path(path).is_file():
            raise ConfigError(f"{key} has {path}, which is not a file: give one that is, or leave it out.")
        text = TextSet.load(
            path,
            tokenizer,
            max_tokens=max_tokens,
            max_document_bytes=max_document_bytes,
            vocab_size=vocab_size,
        )
        if text.name in texts:
            raise ConfigError(
                f"{key} has two files called {text.name}, {path} the second, and results go by that name: "
                "rename or leave out one."
            )
        texts[text.name] = text
    return list(texts.values())


def _documents(path: Path, longest: int) -> Iterator[str]:
    """Yield the non-empty documents."""
    suffix = suffix_of(path.name, _KINDS)
    kind = "text" if suffix is None else _KINDS[suffix]
    status = path.stat()
    file = InputFile(str(path), str(path), kind, status.st_size, status.st_mtime_ns)
    for record in read_piece(Piece(file, 0, None, status.st_size), TEXT_KEY, lambda _: None, longest):
        if isinstance(record, BadRecord):
            raise DataError(
                f"the text {record.source} {record.reason}: give UTF-8 text, or JSON lines or parquet with "
                f"a {TEXT_KEY!r}."
            )
        if record.text:
            yield record.text


def _encode(
    text: str, tokenizer: Tokenizer, wanted: int | None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Encode a text or its beginning; the margin is there because a token's extent depends on the text after it.

    Returns:
        The ids, and the number of text bytes that each stands for: exact for byte-level tokens, which spell the
        text; others may drop characters, whose bytes are then distributed in proportion.
    """
    length = len(text) if wanted is None else (wanted + _MARGIN_TOKENS) * _CHARACTERS_PER_TOKEN
    while True:
        begun = text[:length]
        ids = tokenizer.encode_batch([begun])[0]
        if length >= len(text) or wanted is None or len(ids) >= wanted + _MARGIN_TOKENS:
            break
        length *= 2
    types, index = np.unique(ids, return_inverse=True)
    spelled = np.array([len(tokenizer.token_bytes(int(i))) for i in types], np.float64)[index]
    total = spelled.sum()
    scale = len(begun.encode()) / total if total else 0.0
    return ids, spelled * scale
