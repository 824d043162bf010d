"""Token types as readers know them: how one is written, and which are whole words.

Shapes: Q ids chosen.
"""

import numpy as np
from numpy.typing import NDArray

from tide_mega.data.tokenizer import Tokenizer

SPACE = "␣"
"""Stands for a blank, so that ` word` and `word` differ to the eye."""
LEAST_LETTERS = 5


def readable(tokenizer: Tokenizer, token_id: int) -> str:
    """Return a token's text, blanks as ␣, what cannot be printed escaped, parts of characters as bytes."""
    piece = tokenizer.token_bytes(token_id)
    try:
        text = piece.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(f"<{byte:02x}>" for byte in piece)
    if not text:
        return f"<id {token_id}>"
    return "".join(SPACE if c == " " else c if c.isprintable() else repr(c)[1:-1] for c in text)


def choose_words(
    tokenizer: Tokenizer, ids: NDArray[np.integer], number: int, seed: int
) -> NDArray[np.integer]:
    """Draw so many whole words of five ASCII letters or more, of which lower case first; fewer if there are fewer.

    A word begins with a blank if any of `ids` does, else it may be any run of letters.
    """
    texts = {int(v): tokenizer.token_text(int(v)) for v in ids}
    begins = " " if any(text.startswith(" ") for text in texts.values()) else ""
    words = [
        v for v, text in texts.items() if text.startswith(begins) and _is_word(text.removeprefix(begins))
    ]
    lower = [v for v in words if texts[v].islower()]
    pool = np.array(lower if len(lower) >= number else words, dtype=np.int64)
    return sample(pool, number, seed)


def sample(ids: NDArray[np.integer], number: int, seed: int) -> NDArray[np.integer]:
    """Draw so many ids, all where there are no more, ascending."""
    if len(ids) <= number:
        return np.sort(ids)
    return np.sort(np.random.default_rng(seed).choice(ids, number, replace=False))


def _is_word(text: str) -> bool:
    return len(text) >= LEAST_LETTERS and text.isascii() and text.isalpha()
