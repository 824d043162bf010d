"""Streams token ids as text: never half a character, and nothing of a stop string."""

import codecs
from collections.abc import Sequence

from tide_mega.data.tokenizer import Tokenizer


class TextStream:
    """The text of one request, released as soon as no later token can change it."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        """`stops` end the text at the first occurrence of any."""
        self._tokenizer = tokenizer
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        """Text that may be the beginning of a stop string."""
        self.is_stopped = False

    def add(self, token_id: int) -> str:
        """Add a token; return the text that can be written now. Special tokens have no text."""
        if self.is_stopped or token_id in self._tokenizer.special_ids:
            return ""
        self._held += self._bytes.decode(self._tokenizer.token_bytes(token_id))
        return self._release()

    def end(self) -> str:
        """Return the rest; bytes of incomplete characters become U+FFFD."""
        if self.is_stopped:
            return ""
        self._held += self._bytes.decode(b"", final=True)
        text = self._release()
        text, self._held = text + self._held, ""
        return text

    def _release(self) -> str:
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        cut = len(self._held) - self._open_length()
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def _open_length(self) -> int:
        """Return the length of the longest suffix of the held text that is a prefix of a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        return next(
            (
                length
                for length in range(min(longest, len(self._held)), 0, -1)
                if any(stop.startswith(self._held[-length:]) for stop in self._stops)
            ),
            0,
        )
