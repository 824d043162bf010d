"""Tokenizers behind one small interface.

Text is only ever text: what looks like a special token inside a document is encoded as ordinary
characters, and nothing is added at either end.
"""

import codecs
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from tide_mega.config.errors import ConfigError
from tide_mega.data.trial import try_tokenizer

EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
"""Names tried, in this order, for the end-of-document token of a tokenizer.json."""
_FILE_NAMES = ("tokenizer.json", "tokenizer.model")
_SUFFIXES = (".json", ".model")
MOST_TYPES = 2**24
"""Ids stay below it: counts, deciles and a model's rows have a place for each."""


class Tokenizer(ABC):
    """What the data package needs of a tokenizer."""

    vocab_size: int
    """One past the largest token id."""
    eos_id: int
    """Appended after every document."""
    special_ids: frozenset[int]
    """Ids that no text is encoded to; includes `eos_id`."""
    fingerprint: str
    """SHA-256 of the tokenizer's file and of the chosen EOS."""

    @abstractmethod
    def encode_batch(self, texts: list[str]) -> list[NDArray[np.int64]]:
        """Token ids of each text, [tokens of the text]."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens by their names; invalid UTF-8 becomes U+FFFD."""

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for (b"" for an id without a token); may be a part of a character."""

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text; invalid UTF-8 becomes U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")


def load_tokenizer(path: Path | str, eos_token: str | None = None, *, is_tried: bool = False) -> Tokenizer:
    """Loads a HF tokenizer.json, a Llama-3 tokenizer.model, or the one of these in a folder.

    The libraries end the process on some files: each content is tried in a child process once, which takes about
    as long again as loading it. `is_tried` says that the process which started this one has done so.

    Raises:
        ConfigError: there is no such file, it is of another kind, has no EOS token or an absurd id, or cannot be
            loaded within the limits of `trial`.
    """
    path = find_tokenizer(path)
    if not path.is_file():
        raise ConfigError(f"tokenizer={path} does not exist; give a tokenizer.json or a tokenizer.model")
    if not is_tried and path.suffix in _SUFFIXES:
        try_tokenizer(path, eos_token)
    return load_untried(path, eos_token)


def load_untried(path: Path, eos_token: str | None) -> Tokenizer:
    """Loads a tokenizer's file here and now; see `load_tokenizer`."""
    if path.suffix == ".json":
        return HFTokenizer(path, eos_token)
    if path.suffix == ".model":
        return Llama3Tokenizer(path, eos_token)
    raise ConfigError(f"tokenizer={path} is neither a .json (HF tokenizers) nor a .model (Llama-3) file")


def find_tokenizer(path: Path | str) -> Path:
    """`path` itself, or for a folder the tokenizer file in it."""
    path = Path(path)
    if path.is_dir():
        return next((path / name for name in _FILE_NAMES if (path / name).is_file()), path / _FILE_NAMES[0])
    return path


def _fingerprint(path: Path, eos_id: int) -> str:
    return hashlib.sha256(path.read_bytes() + f"|eos={eos_id}".encode()).hexdigest()


class HFTokenizer(Tokenizer):
    """A tokenizer.json, run by the `tokenizers` library."""

    def __init__(self, path: Path, eos_token: str | None = None) -> None:
        try:
            content = path.read_text(encoding="utf-8-sig")
            self._inner = tokenizers.Tokenizer.from_str(content)
            description = json.loads(content)
        except Exception as error:  # the library raises Exception itself
            raise ConfigError(f"tokenizer={path} is not a readable tokenizer.json: {error}") from error
        self._inner.no_truncation()
        self._inner.no_padding()
        self._inner.encode_special_tokens = True  # leave special tokens in text unparsed
        vocabulary = self._inner.get_vocab(with_added_tokens=True)
        self.vocab_size = _sane_size(path, max(vocabulary.values(), default=-1) + 1)
        added = self._inner.get_added_tokens_decoder()
        self._added = {index: token.content for index, token in added.items()}
        self.eos_id = _find_eos(path, vocabulary, eos_token)
        special = {index for index, token in added.items() if token.special}
        self.special_ids = frozenset(special | {self.eos_id})
        self.fingerprint = _fingerprint(path, self.eos_id)
        # Whether pieces are spelled in the byte-level alphabet, one printable character for each byte.
        self._byte_level = '"ByteLevel"' in json.dumps(
            [description.get("pre_tokenizer"), description.get("decoder")]
        )
        self._word_piece = description["model"].get("type") == "WordPiece"

    def encode_batch(self, texts: list[str]) -> list[NDArray[np.int64]]:
        """See `Tokenizer.encode_batch`."""
        encodings = self._inner.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        return str(self._inner.decode([int(index) for index in ids], skip_special_tokens=False))

    def token_bytes(self, token_id: int) -> bytes:
        """See `Tokenizer.token_bytes`."""
        if token_id in self._added:
            return self._added[token_id].encode()
        piece = self._inner.id_to_token(token_id)
        if piece is None:
            return b""
        if self._byte_level:
            return b"".join(BYTE_OF_CHARACTER.get(character, character.encode()) for character in piece)
        if byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):
            return bytes.fromhex(byte[1])
        if self._word_piece:
            return piece.removeprefix("##").encode()
        return piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()


def _sane_size(path: Path, size: int) -> int:
    if size > MOST_TYPES:
        raise ConfigError(
            f"tokenizer={path} has a token of id {size - 1:,}, and ids stay below {MOST_TYPES:,}: it is damaged, "
            "or made to take all memory; take it from its source."
        )
    return size


def _find_eos(path: Path, vocabulary: dict[str, int], eos_token: str | None) -> int:
    if eos_token is not None:
        if eos_token not in vocabulary:
            raise ConfigError(f"eos_token={eos_token} is not in the vocabulary of tokenizer={path}")
        return vocabulary[eos_token]
    for name in EOS_NAMES:
        if name in vocabulary:
            return vocabulary[name]
    raise ConfigError(
        f"tokenizer={path} has none of {', '.join(EOS_NAMES)}; name its end-of-document token with eos_token"
    )


def _byte_level_alphabet() -> dict[str, int]:
    """The byte-level BPE spelling: printable Latin-1 bytes stand for themselves, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF_CHARACTER = {character: bytes([byte]) for character, byte in _byte_level_alphabet().items()}
"""What the characters of byte-level BPE stand for."""


class Llama3Tokenizer(Tokenizer):
    """Llama-3's tokenizer.model (base64 token and rank on each line), run by tiktoken.

    256 special tokens follow the ranks of the file: 128,000 + 256 = 128,256 for Llama 3 and 3.1.
    """

    NUM_SPECIAL = 256
    PATTERN = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    _NAMED = (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>",
        "<|finetune_right_pad_id|>",
        "<|step_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
    )
    # The public tokenizer cuts text here before it matches, which bounds the matcher's stack.
    _LONGEST_TEXT = 400_000
    _LONG_RUN = re.compile(r"\S{25000}|\s{25000}")

    def __init__(self, path: Path, eos_token: str | None = None) -> None:
        import tiktoken

        self.ranks = ranks = _read_ranks(path)
        # Llama 3.1's reserved tokens go on from number 2 after the named ones.
        reserved = (f"<|reserved_special_token_{2 + i}|>" for i in range(self.NUM_SPECIAL - len(self._NAMED)))
        special = {name: len(ranks) + i for i, name in enumerate((*self._NAMED, *reserved))}
        self._inner = tiktoken.Encoding(
            name="llama3", pat_str=self.PATTERN, mergeable_ranks=ranks, special_tokens=special
        )
        self.vocab_size = _sane_size(path, len(ranks) + self.NUM_SPECIAL)
        self.eos_id = _find_eos(path, special, eos_token)
        self.special_ids = frozenset(special.values())
        self.fingerprint = _fingerprint(path, self.eos_id)

    def encode_batch(self, texts: list[str]) -> list[NDArray[np.int64]]:
        """See `Tokenizer.encode_batch`."""
        return [
            np.concatenate(
                [np.asarray(self._inner.encode_ordinary(part), dtype=np.int64) for part in self._parts(text)]
            )
            for text in texts
        ]

    def _parts(self, text: str) -> Iterator[str]:
        for start in range(0, max(len(text), 1), self._LONGEST_TEXT):
            chunk = text[start : start + self._LONGEST_TEXT]
            cut = 0
            for run in self._LONG_RUN.finditer(chunk):
                yield chunk[cut : run.end()]
                cut = run.end()
            yield chunk[cut:]

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        return str(self._inner.decode([int(index) for index in ids], errors="replace"))

    def token_bytes(self, token_id: int) -> bytes:
        """See `Tokenizer.token_bytes`."""
        return bytes(self._inner.decode_single_token_bytes(token_id))


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Reads the file itself: tiktoken's own loader keeps a cache by path, blind to a changed file."""
    import base64

    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise ConfigError(
                f"tokenizer={path} is not a Llama-3 tokenizer.model: line {number} is not a base64 token and "
                "its rank (a SentencePiece model must be converted to a tokenizer.json)"
            ) from error
    if sorted(ranks.values()) != list(range(len(ranks))) or not ranks:
        raise ConfigError(f"tokenizer={path} does not rank its tokens from 0 without a gap: it is damaged")
    return ranks
