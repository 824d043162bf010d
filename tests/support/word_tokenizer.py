"""A tokenizer of words, for tests that say themselves what one token is."""

import re

import numpy as np

from tide_mega.data.tokenizer import Tokenizer


class WordTokenizer(Tokenizer):
    """Known words with the space before them, up to three digits, and single characters."""

    eos_id, special_ids, fingerprint = 0, frozenset({0}), "test"

    def __init__(self, *words: str) -> None:
        self._texts = ["<eos>", *(f" {word}" for word in words)]
        self.vocab_size = 5000

    def encode_batch(self, texts):
        return [
            np.array([i for piece in re.findall(r"\d{1,3}| ?[A-Za-z']+|.", text) for i in self._ids(piece)])
            for text in texts
        ]

    def _ids(self, piece):
        known = piece in self._texts or piece.isdigit()
        for text in [piece] if known else piece:
            if text not in self._texts:
                self._texts.append(text)
            yield self._texts.index(text)

    def decode(self, ids):
        return "".join(self._texts[i] for i in ids)

    def token_bytes(self, token_id):
        return self._texts[token_id].encode() if token_id < len(self._texts) else b""
