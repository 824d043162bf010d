"""Which pairs are measured: those whose words are single tokens of the tokenizer at hand, in every template.

Shapes: W words, S tokens up to and including the slot, V vocabulary.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tide_mega.data.frequency import BIN_GROUPS
from tide_mega.data.tokenizer import Tokenizer
from tide_mega.diagnostics.separation.categories import Category, Pair
from tide_mega.diagnostics.separation.templates import Template

SAMPLED = "sampled rare pairs"
MAX_PAIRS = 12
"""Measured of each category."""
_LENGTHS, _SUFFIX = range(5, 13), 3
"""Letters of a sampled rare word, and those at its end that a pair shares."""

Status = Literal["measured", "dropped", "not needed"]


@dataclass(frozen=True)
class Verdict:
    """What became of a pair."""

    pair: Pair
    status: Status
    reason: str
    """Empty for a measured one."""
    ids: tuple[int, int] | None
    """Of a measured pair."""


@dataclass(frozen=True)
class ChosenPairs:
    """The pairs of a category that are measured, as token ids."""

    category: str
    templates: tuple[Template, ...] = field(repr=False)
    verdicts: tuple[Verdict, ...]
    ids_W: NDArray[np.int64]
    """Distinct tokens of the measured pairs, ascending."""
    contexts: tuple[NDArray[np.int64], ...]
    """Of each template, the ids before the slot [S - 1]."""

    @property
    def measured(self) -> list[Verdict]:
        """In the order of preference."""
        return [verdict for verdict in self.verdicts if verdict.status == "measured"]

    @property
    def names(self) -> list[str]:
        """Of the measured pairs."""
        return ["/".join(verdict.pair) for verdict in self.measured]

    @property
    def columns(self) -> list[tuple[int, int]]:
        """Where the measured pairs stand in `ids_W`."""
        place = {index: column for column, index in enumerate(self.ids_W.tolist())}
        return [(place[first], place[second]) for first, second in (v.ids for v in self.measured if v.ids)]


def choose_pairs(category: Category, tokenizer: Tokenizer, limit: int = MAX_PAIRS) -> ChosenPairs:
    """Keep the first `limit` pairs whose two sentences differ in one token alone, the word itself."""
    encoder = _Encoder(tokenizer, category.templates)
    verdicts = []
    kept = 0
    for pair in category.pairs:
        if kept == limit:
            verdicts.append(Verdict(pair, "not needed", f"{limit} pairs before it are measured", None))
            continue
        verdicts.append(encoder.judge(pair))
        kept += verdicts[-1].status == "measured"
    ids = sorted({index for verdict in verdicts for index in verdict.ids or ()})
    return ChosenPairs(
        category.name,
        category.templates,
        tuple(verdicts),
        np.array(ids, np.int64),
        tuple(encoder.contexts),
    )


def sampled_rare_pairs(
    tokenizer: Tokenizer, bins_V: NDArray[np.int8], seed: int, templates: tuple[Template, ...]
) -> Category:
    """Pair rare words of the tokenizer itself that end alike, for one that has none of the listed pairs.

    Candidates are tokens of the rare deciles that begin a word, in lower case, and begin no longer token, which
    leaves out most fragments. The two of a pair share their last three letters, and no two pairs do.
    """
    texts = [tokenizer.token_text(index) for index in range(tokenizer.vocab_size)]
    ordered = sorted(set(texts))
    continued = {text for text, following in itertools.pairwise(ordered) if following.startswith(text)}
    by_ending: dict[str, list[str]] = {}
    for index in np.flatnonzero(np.isin(bins_V[: len(texts)], list(BIN_GROUPS["rare"]))).tolist():
        word = texts[index].strip()
        whole = texts[index] == f" {word}" and texts[index] not in continued
        if whole and len(word) in _LENGTHS and word.isascii() and word.isalpha() and word.islower():
            by_ending.setdefault(word[-_SUFFIX:], []).append(word)
    generator = np.random.default_rng(seed)
    pairs: list[Pair] = []
    for ending in sorted(by_ending):
        words = [str(word) for word in generator.permutation(by_ending[ending])]
        pairs += itertools.islice(zip(words[::2], words[1::2], strict=False), 1)
    order = generator.permutation(len(pairs))
    return Category(SAMPLED, tuple(pairs[i] for i in order), templates)


class _Encoder:
    """Encodes every template with a word, once."""

    def __init__(self, tokenizer: Tokenizer, templates: Sequence[Template]) -> None:
        self._tokenizer, self._templates = tokenizer, templates
        self._encoded: dict[str, list[NDArray[np.int64]]] = {}
        self.contexts: list[NDArray[np.int64]] = []

    def judge(self, pair: Pair) -> Verdict:
        slots = [self._slot(*both) for both in zip(*(self._sentences(word) for word in pair), strict=True)]
        found = {None if slot is None else slot[1:] for slot in slots}
        ids = next(iter(found))
        if len(found) != 1 or ids is None:
            return Verdict(pair, "dropped", self._reason(pair), None)
        if tuple(self._tokenizer.token_text(index).strip() for index in ids) != pair:
            return Verdict(pair, "dropped", self._reason(pair), None)
        if not self.contexts:
            first = self._sentences(pair[0])
            self.contexts = [ids_N[: slot[0]] for ids_N, slot in zip(first, slots, strict=True) if slot]
        return Verdict(pair, "measured", "", ids)

    def _sentences(self, word: str) -> list[NDArray[np.int64]]:
        if word not in self._encoded:
            texts = [template.sentence(word) for template in self._templates]
            self._encoded[word] = self._tokenizer.encode_batch(texts)
        return self._encoded[word]

    @staticmethod
    def _slot(first_N: NDArray[np.int64], second_N: NDArray[np.int64]) -> tuple[int, int, int] | None:
        """Position and the two ids, if just one token differs."""
        if len(first_N) != len(second_N):
            return None
        differ = np.flatnonzero(first_N != second_N)
        if len(differ) != 1:
            return None
        position = int(differ[0])
        return position, int(first_N[position]), int(second_N[position])

    def _reason(self, pair: Pair) -> str:
        parts = []
        for word in pair:
            pieces = [
                self._tokenizer.token_text(int(i)) for i in self._tokenizer.encode_batch([f" {word}"])[0]
            ]
            pieces = [piece.strip() for piece in pieces if piece.strip()]
            if len(pieces) > 1:
                parts.append(f"{word} is {len(pieces)} tokens ({'|'.join(pieces)})")
        return "; ".join(parts) or "the two sentences differ in more than one token"
