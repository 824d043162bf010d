"""Tokenizers behind one small interface, each tried in a child process before it is loaded.

Text is only ever text: what looks like a special token inside a document is encoded as ordinary characters, and
nothing is added at either end.

On some files the tokenizer libraries end the process that runs them, so each file is first loaded in a child
process (`try_tokenizer`). A file that takes too much memory or time, or ends the child, is refused, and the
calling process continues.
"""

import codecs
import contextlib
import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

import tide_mega
from tide_mega.errors import ConfigError

EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
"""Names tried, in this order, for the end-of-document token of a tokenizer.json."""
_FILE_NAMES = ("tokenizer.json", "tokenizer.model")
_SUFFIXES = (".json", ".model")
MOST_TYPES = 2**24
"""Upper bound of token ids: counts, deciles and a model's rows have an entry for each."""

MOST_BYTES = 4 * 2**30
"""Address-space limit of the child; a tokenizer of 256k tokens takes less than 1 GiB."""
MOST_SECONDS = 60
"""CPU-time limit of the child; a tokenizer of 256k tokens takes about 3 s."""
_PATIENCE = 10 * MOST_SECONDS
"""Wall-time limit in seconds, as a file system or other processes may keep the child waiting."""
_SAID, _MEMORY = 3, 4
"""Exit statuses of the child: the loader refused the file with a message; it ran out of memory."""
_PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from tide_mega.data.tokenizer import try_here
try_here(*json.loads(sys.argv[2]))
"""
_ALONE = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
_ALONE |= {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
"""Environment of the child: each thread would reserve address space."""
_passed: set[str] = set()
"""SHA-256 of content and EOS of the tokenizers that this process has tried."""


class Tokenizer(ABC):
    """The interface that the data package needs of a tokenizer."""

    vocab_size: int
    """One past the largest token id."""
    eos_id: int
    """Appended after every document."""
    special_ids: frozenset[int]
    """Ids that no text is encoded to, including `eos_id`."""
    fingerprint: str
    """SHA-256 of the tokenizer's file and of the chosen EOS."""

    @abstractmethod
    def encode_batch(self, texts: list[str]) -> list[NDArray[np.int64]]:
        """Return the token ids of each text [tokens of the text]."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids, with special tokens by name; invalid UTF-8 becomes U+FFFD."""

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token (b"" for an unassigned id); may be part of a character."""

    def token_text(self, token_id: int) -> str:
        """Return `token_bytes` as text; invalid UTF-8 becomes U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")


def load_tokenizer(path: Path | str, eos_token: str | None = None, *, is_tried: bool = False) -> Tokenizer:
    """Load a HF tokenizer.json, a Llama-3 tokenizer.model, or whichever of them a folder contains.

    Each file content is first tried once in a child process (`try_tokenizer`), which about doubles the loading
    time. `is_tried` means that the parent process has already done so.

    Raises:
        ConfigError: there is no such file, it is of another kind, has no EOS token or an absurd id, or cannot be
            loaded within the limits of `try_tokenizer`.
    """
    path = find_tokenizer(path)
    if not path.is_file():
        raise ConfigError(f"tokenizer={path} does not exist; give a tokenizer.json or a tokenizer.model")
    if not is_tried and path.suffix in _SUFFIXES:
        try_tokenizer(path, eos_token)
    return load_untried(path, eos_token)


def load_untried(path: Path, eos_token: str | None) -> Tokenizer:
    """Load a tokenizer file in this process without a trial; see `load_tokenizer`."""
    if path.suffix == ".json":
        return HFTokenizer(path, eos_token)
    if path.suffix == ".model":
        return Llama3Tokenizer(path, eos_token)
    raise ConfigError(f"tokenizer={path} is neither a .json (HF tokenizers) nor a .model (Llama-3) file")


def find_tokenizer(path: Path | str) -> Path:
    """Return `path` itself, or the tokenizer file in the folder `path`."""
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
        except Exception as error:  # the library raises plain Exception
            raise ConfigError(f"tokenizer={path} is not a readable tokenizer.json: {error}") from error
        self._inner.no_truncation()
        self._inner.no_padding()
        self._inner.encode_special_tokens = True  # encode special tokens in text as ordinary text
        vocabulary = self._inner.get_vocab(with_added_tokens=True)
        self.vocab_size = _sane_size(path, max(vocabulary.values(), default=-1) + 1)
        added = self._inner.get_added_tokens_decoder()
        self._added = {index: token.content for index, token in added.items()}
        self.eos_id = _find_eos(path, vocabulary, eos_token)
        special = {index for index, token in added.items() if token.special}
        self.special_ids = frozenset(special | {self.eos_id})
        self.fingerprint = _fingerprint(path, self.eos_id)
        # Whether pieces are spelled in the byte-level alphabet, with one printable character per byte.
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
    """Return the byte-level BPE alphabet: printable Latin-1 bytes map to themselves, others to U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF_CHARACTER = {character: bytes([byte]) for character, byte in _byte_level_alphabet().items()}
"""The byte that each character of byte-level BPE stands for."""


class Llama3Tokenizer(Tokenizer):
    """Llama-3's tokenizer.model (a base64 token and its rank per line), run by tiktoken.

    256 special tokens follow the ranks in the file: 128,000 + 256 = 128,256 for Llama 3 and 3.1.
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
    # Llama's public tokenizer cuts text at these lengths before matching, which bounds the matcher's stack.
    _LONGEST_TEXT = 400_000
    _LONG_RUN = re.compile(r"\S{25000}|\s{25000}")

    def __init__(self, path: Path, eos_token: str | None = None) -> None:
        import tiktoken

        self.ranks = ranks = _read_ranks(path)
        # Llama 3.1's reserved tokens continue from number 2 after the named ones.
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
    """Read the ranks without tiktoken's own loader, whose cache by path does not notice a changed file."""
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


def try_tokenizer(path: Path, eos_token: str | None) -> None:
    """Load a tokenizer file in a child process, unless this process has already tried the same content.

    A file that the loader itself refuses passes the trial, since loading it next reports the reason.

    Raises:
        ConfigError: the child crashed or exceeded the limits of memory and time.
        OSError: the file cannot be read.
    """
    content = hashlib.sha256(path.read_bytes() + f"|eos={eos_token}".encode()).hexdigest()
    if content in _passed:
        return
    words = [sys.executable, "-I", "-S", "-c", _PROGRAM]
    words += [
        json.dumps(_import_path()),
        json.dumps([str(path.resolve()), eos_token, MOST_BYTES, MOST_SECONDS]),
    ]
    try:
        done = subprocess.run(
            words,
            env=os.environ | _ALONE,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _refusal(path, f"was not loaded within {_PATIENCE} s") from None
    if done.returncode not in (0, _SAID):
        raise _refusal(path, _ending(done.returncode, done.stderr.decode(errors="replace")))
    _passed.add(content)


def _import_path() -> list[str]:
    """Return the child's module search path: this process's path and the location of this package.

    An editable installation may be found through a hook of `site`, which the child does not run, instead of the
    path.
    """
    return [*sys.path, str(Path(tide_mega.__file__).resolve().parents[1])]


def _ending(status: int, said: str) -> str:
    if status == _MEMORY:
        return f"takes more than {MOST_BYTES // 2**30} GiB of memory to load"
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"takes more than {MOST_SECONDS} s to load"
    why = f"signal {-status}" if status < 0 else f"status {status}"
    last = (said.strip().splitlines() or ["nothing said"])[-1]
    return f"ends the process that loads it ({why}: {last[:200]})"


def _refusal(path: Path, why: str) -> ConfigError:
    return ConfigError(f"tokenizer={path} {why}: it is damaged, or made to do harm; take it from its source.")


def try_here(path: str, eos_token: str | None, most_bytes: int, most_seconds: int) -> None:
    """Entry point of the child: load the file under the limits and encode a short text with it."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (most_seconds, most_seconds + 5))

    try:
        tokenizer = load_untried(Path(path), eos_token)
        # Errors on a text that it has no tokens for, tiktoken's panic included, are not fatal.
        with contextlib.suppress(BaseException):
            tokenizer.encode_batch(["A few words, 12 of them.\n"])
    except ConfigError as error:
        sys.exit(_MEMORY if isinstance(error.__cause__, MemoryError) else _SAID)
    except MemoryError:
        sys.exit(_MEMORY)
