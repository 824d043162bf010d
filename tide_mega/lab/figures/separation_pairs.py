"""Which pairs of tokens the separation is measured on, and the sentences they stand in.

There are three categories of pairs. A pair is measured if both words are single tokens of the tokenizer at hand in
every template; each category lists more pairs than are measured, since no tokenizer has all of them. Each category
has 150 sentences with one slot, used for all of its pairs. The states at the slot cannot depend on what follows
it, so the templates differ in the text before the slot.

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

SLOT = "___"


@dataclass(frozen=True)
class Template:
    """A sentence with a word left out."""

    before: str
    """Up to the space before the slot."""
    after: str
    """The text after the slot, beginning with a space or punctuation."""

    def sentence(self, word: str) -> str:
        """Fill the slot."""
        return f"{self.before} {word}{self.after}"


def _combine(openings: tuple[str, ...], frames: tuple[str, ...]) -> tuple[Template, ...]:
    """Join every opening with every frame, ordered so that the first few differ in both."""
    templates = []
    for turn in range(len(frames)):
        for i, opening in enumerate(openings):
            before, after = frames[(i + turn) % len(frames)].split(SLOT)
            templates.append(Template(f"{opening}, {before.strip()}", after))
    return tuple(templates)


_LESSONS = (
    "Yesterday",
    "Before lunch",
    "During the first lesson",
    "Just after the break",
    "Early in the term",
    "At the end of the class",
    "In the middle of the test",
    "One rainy morning",
    "Without any hesitation",
    "For the third time",
    "Late in the afternoon",
    "On the final day",
    "A few minutes later",
    "To everyone's surprise",
    "While the others were still busy",
)
_MENTIONS = (
    "the teacher wrote the word ___ on the board.",
    "a student asked how to spell ___ in an essay.",
    "the editor struck out one word, put ___ instead and moved on.",
    "the page that they had printed began with ___ in large letters.",
    "my brother mistook another word for ___ when he was typing.",
    "the child in the front row read ___ out loud.",
    "the computer suggested ___ as a correction.",
    "nobody at the back could tell whether she had said ___ or something else.",
    "the tutor explained when to use ___ and when not to.",
    "the answer on the sheet turned out to be ___ after all.",
)

_OCCASIONS = (
    "According to the report",
    "As the notes show",
    "On the first day",
    "By the end of the week",
    "For some reason",
    "After a long search",
    "Without further delay",
    "To our relief",
    "Just before noon",
    "Once again",
    "In the early evening",
    "During the second week",
    "As we had expected",
    "Shortly before closing time",
    "In the confusion that followed",
)
_NUMBERED = (
    "the clerk asked for file ___ from the archive.",
    "the missing item was listed as number ___ in the register.",
    "the passengers of flight ___ waited at the gate.",
    "the parcel was put into locker ___ by mistake.",
    "the quotation was found on page ___ of the manual.",
    "the guests were moved to room ___ on another floor.",
    "the inspector opened box ___ and counted the contents.",
    "the driver of bus ___ took a different road.",
    "the painting was sold as lot ___ at the auction.",
    "the bank sent invoice ___ back to the company.",
)

_STUDIES = (
    "In the latest study",
    "According to the records",
    "During the second trial",
    "After several attempts",
    "At the regional laboratory",
    "As the paper reports",
    "Over the following month",
    "In a separate experiment",
    "For the first time",
    "On closer inspection",
    "Earlier this year",
    "Despite the warnings",
    "As a precaution",
    "In the same week",
    "At the end of the season",
)
_SUBSTANCES = (
    "the team measured the amount of ___ in every sample.",
    "the supplier delivered ___ in sealed containers.",
    "the authors compared ___ with several alternatives.",
    "two researchers found traces of ___ in the water.",
    "the technician stored ___ on the upper shelf.",
    "the instructor described ___ in great detail.",
    "a shipment of ___ was held up at the border.",
    "the experts insisted that ___ must be handled carefully.",
    "the price of ___ rose faster than expected.",
    "the summary mentioned ___ more than once.",
)

HOMOPHONE_TEMPLATES = _combine(_LESSONS, _MENTIONS)
"""They mention the word rather than use it, so that either word of a pair makes a sensible sentence."""
NUMERAL_TEMPLATES = _combine(_OCCASIONS, _NUMBERED)
DOMAIN_TEMPLATES = _combine(_STUDIES, _SUBSTANCES)


Pair = tuple[str, str]


@dataclass(frozen=True)
class Category:
    """Pairs of one kind, the preferred ones first, and the sentences they are put into."""

    name: str
    pairs: tuple[Pair, ...]
    templates: tuple[Template, ...] = field(repr=False)


def _pairs(text: str) -> tuple[Pair, ...]:
    return tuple((first, second) for first, second in (pair.split("/") for pair in text.split()))


def _next_to_each_other(*numbers: int) -> tuple[Pair, ...]:
    return tuple((str(number), str(number + 2)) for number in numbers)


HOMOPHONES = Category(
    "grammatical homophones",
    _pairs(
        "their/there its/it's your/you're to/too then/than affect/effect whose/who's lose/loose accept/except "
        "whether/weather principal/principle advice/advise "
        # fallback if these are not tokens: homophones of different parts of speech
        "two/to two/too were/where our/are by/buy for/four write/right no/know here/hear one/won do/due "
        "some/sum not/knot be/bee in/inn new/knew would/wood which/witch week/weak wait/weight see/sea "
        "main/mane passed/past"
    ),
    HOMOPHONE_TEMPLATES,
)
NUMERALS = Category(
    "numerals",
    (
        *_next_to_each_other(1847, 1849, 1862, 1873, 1895, 1901, 1912, 1926, 1934, 1953, 1968, 1987),
        # up to three digits, for tokenizers without longer numbers
        *_next_to_each_other(847, 849, 361, 573, 695, 218, 127, 432, 754, 906, 583, 641),
        *_next_to_each_other(47, 62, 73, 95, 18, 34, 26, 53, 87, 12, 68, 41),
        *_pairs("10/12 16/32 64/128 3/5 7/9 2/4 6/8 1/3 5/7 4/6 2/3 8/9 1/2 0/1 4/5 6/7"),
    ),
    NUMERAL_TEMPLATES,
)
DOMAIN_SYNONYMS = Category(
    "rare domain synonyms",
    _pairs(
        "ibuprofen/acetaminophen morphine/codeine penicillin/amoxicillin benzene/toluene ethanol/methanol "
        "basalt/granite quartz/feldspar insulin/glucagon collagen/keratin dopamine/serotonin xenon/krypton "
        "silicon/germanium arsenic/cadmium glucose/fructose lactose/sucrose lithium/sodium cobalt/nickel "
        "helium/argon cortisol/adrenaline limestone/sandstone nylon/polyester aluminum/titanium zinc/copper "
        "nitrogen/oxygen"
    ),
    DOMAIN_TEMPLATES,
)
CATEGORIES = (HOMOPHONES, NUMERALS, DOMAIN_SYNONYMS)


SAMPLED = "sampled rare pairs"
MAX_PAIRS = 12
"""Pairs measured per category."""
_LENGTHS, _SUFFIX = range(5, 13), 3
"""Length of a sampled rare word in letters, and the length of the ending that a pair shares."""

Status = Literal["measured", "dropped", "not needed"]


@dataclass(frozen=True)
class Verdict:
    """Whether a pair is measured, and if not, why."""

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
    """For each template, the ids before the slot [S - 1]."""

    @property
    def measured(self) -> list[Verdict]:
        """Measured pairs, in order of preference."""
        return [verdict for verdict in self.verdicts if verdict.status == "measured"]

    @property
    def names(self) -> list[str]:
        """Of the measured pairs."""
        return ["/".join(verdict.pair) for verdict in self.measured]

    @property
    def columns(self) -> list[tuple[int, int]]:
        """Indices of the measured pairs into `ids_W`."""
        place = {index: column for column, index in enumerate(self.ids_W.tolist())}
        return [(place[first], place[second]) for first, second in (v.ids for v in self.measured if v.ids)]


def choose_pairs(category: Category, tokenizer: Tokenizer, limit: int = MAX_PAIRS) -> ChosenPairs:
    """Keep the first `limit` pairs whose two sentences differ only in one token, the word itself."""
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
    """Pair rare words of the tokenizer with equal endings, for tokenizers that have none of the listed pairs.

    Candidates are lower-case tokens of the rare deciles that begin a word and are no prefix of a longer token,
    which excludes most fragments. The words of a pair share their last three letters; no two pairs share them.
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
        """Return the position and the two ids if exactly one token differs."""
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
