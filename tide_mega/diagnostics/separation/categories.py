"""The three kinds of token pairs, each with more pairs than are measured: not all are tokens everywhere."""

from dataclasses import dataclass, field

from tide_mega.diagnostics.separation.templates import (
    DOMAIN_TEMPLATES,
    HOMOPHONE_TEMPLATES,
    NUMERAL_TEMPLATES,
    Template,
)

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
        # where these are not tokens: words that sound alike and belong to different parts of speech
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
        # up to three digits, where a tokenizer has no longer ones
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
