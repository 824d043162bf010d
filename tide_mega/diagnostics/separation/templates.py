"""Sentences with one slot, the same for every pair of a category: 150 different left contexts each.

What follows the slot cannot be seen from it, so what counts is that the text before it differs.
"""

from dataclasses import dataclass

SLOT = "___"


@dataclass(frozen=True)
class Template:
    """A sentence with a word left out."""

    before: str
    """Up to the space before the slot."""
    after: str
    """From the slot on: a space or punctuation first."""

    def sentence(self, word: str) -> str:
        """Fill the slot."""
        return f"{self.before} {word}{self.after}"


def _combine(openings: tuple[str, ...], frames: tuple[str, ...]) -> tuple[Template, ...]:
    """Join every opening with every frame, such that the first few differ in both."""
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
"""The word is mentioned, not used, so that either word of a pair makes a good sentence."""
NUMERAL_TEMPLATES = _combine(_OCCASIONS, _NUMBERED)
DOMAIN_TEMPLATES = _combine(_STUDIES, _SUBSTANCES)
