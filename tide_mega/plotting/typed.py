"""A figure that shows text as it is typed, whatever names of runs, files and tokens have in them."""

from typing import Any

from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter, Formatter, FuncFormatter

from tide_mega.config.errors import printable

SUBSCRIPTS = str.maketrans("0123456789k", "₀₁₂₃₄₅₆₇₈₉ₖ")
"""For `str.translate`: the index of a table, E₁."""


class TypedFigure(Figure):
    """A figure in which `$` begins no mathematics and control characters are escaped.

    The numbers that matplotlib puts on an axis are its own, 10 to a power on a logarithmic one. Text to be set as
    mathematics has none of its own here: write E₁, not $E_1$.
    """

    def draw(self, renderer: Any) -> None:
        """Draw it; called by everything that writes or measures a figure."""
        numbers: set[Text] = set()
        for axis in self.findobj(Axis):
            numbers |= _numbers(axis)
        for text in self.findobj(Text):
            if text not in numbers:
                text.set_parse_math(False)
                text.set_text(_typed(text.get_text()))
        super().draw(renderer)


class _TypedNames(Formatter):
    """The labels of another formatter, which names chose."""

    def __init__(self, names: Formatter) -> None:
        self._names = names

    def __call__(self, x: float, pos: int | None = None) -> str:
        return _typed(self._names(x, pos)).replace("$", r"\$")


def _numbers(axis: Axis) -> set[Text]:
    """Return the texts of an axis that are matplotlib's to write."""
    # Ticks, and what their labels were told, are made anew while a figure is drawn: what writes them must know.
    for which in (axis.major, axis.minor):
        if isinstance(which.formatter, FixedFormatter | FuncFormatter):
            which.formatter = _TypedNames(which.formatter)
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    return {axis.offsetText, *(text for tick in ticks for text in (tick.label1, tick.label2))}


def _typed(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))
