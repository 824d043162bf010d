"""From texts to what a model scores: spans of tokens of which the last ones count.

The rules are lm-evaluation-harness's, so that scores compare with its other models'.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from tide_mega.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Span:
    """Tokens that are read together; at most one more than the model's longest sequence."""

    tokens: tuple[int, ...]
    scored: int
    """How many, from the end, are predicted; the others are context, at least one."""

    def __post_init__(self) -> None:
        if not 0 < self.scored < len(self.tokens):
            raise ValueError(
                f"{self.scored} of {len(self.tokens)} tokens cannot be scored: one must be context"
            )


@dataclass
class Counts:
    """What happened to requests on their way to the model."""

    requests: int = 0
    truncated: int = 0
    """Lost the beginning of their context to the model's longest sequence."""
    windowed: int = 0
    """Texts longer than a sequence, scored in windows."""
    apart: int = 0
    """Their continuation's first token merges with the context, so the two were encoded apart."""


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int], bool]:
    """Encode both as they stand together; return their tokens and whether they had to be encoded apart.

    Spaces at the end of the context go to the continuation, the whole is encoded, and cut where the tokens of the
    context alone end. An empty context is the end-of-document token. Where the context alone has as many tokens as
    the whole, nothing would be left to score: then each is encoded by itself.
    """
    if not context:
        return [tokenizer.eos_id], _encode(tokenizer, continuation), False
    kept = context.rstrip()
    continuation, context = context[len(kept) :] + continuation, kept
    whole, head = _encode(tokenizer, context + continuation), _encode(tokenizer, context)
    if len(head) < len(whole) and head:
        return head, whole[len(head) :], False
    return head or [tokenizer.eos_id], _encode(tokenizer, continuation), bool(head)


def windows(context: list[int], continuation: list[int], longest: int) -> Iterator[Span]:
    """Yield spans that score every token of the continuation once.

    Usually one, which loses the beginning of the context if it is too long. A continuation longer than `longest`
    tokens is cut into windows of that many inputs: the first predicts `longest` tokens from the last one of the
    context; each further one predicts the next tokens, and the last one keeps as much context as fits.
    """
    tokens = context + continuation
    if len(continuation) <= longest:
        yield Span(tuple(tokens[-(longest + 1) :]), len(continuation))
        return
    first = len(context)
    while first < len(tokens):
        last = min(first + longest, len(tokens))
        yield Span(tuple(tokens[last - longest - 1 : last]), last - first)
        first = last


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return [int(token) for token in tokenizer.encode_batch([text])[0]]
