"""Checks that a tokenizer is the one a model was trained with, since the memory is read by token id."""

import hashlib
import json
from pathlib import Path

TOKENIZER_FILE = "tokenizer.json"


class TokenizerError(ValueError):
    """The tokenizer beside a model is not the model's."""


def vocabulary_fingerprint(path: Path) -> str:
    """Return the SHA-256 of a tokenizer.json's vocabulary, without added tokens.

    It does not change when the file is rewritten or tokens are added.

    Raises:
        TokenizerError: it is not a tokenizer.json.
    """
    try:
        vocabulary = json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TokenizerError(f"{path} cannot be read as a tokenizer.json: {error}") from error
    content = json.dumps(vocabulary, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()


def check_vocabulary(folder: Path, fingerprint: str | None) -> None:
    """Refuse a folder whose tokenizer is another model's; one without a tokenizer.json passes.

    Raises:
        TokenizerError: its vocabulary differs, or cannot be read.
    """
    path = folder / TOKENIZER_FILE
    if fingerprint is not None and path.is_file() and vocabulary_fingerprint(path) != fingerprint:
        raise TokenizerError(
            f"{path} is not this model's tokenizer: its vocabulary is another one, and tokens would be read as "
            "others. Copy the file from where the model came from, or export it again."
        )
