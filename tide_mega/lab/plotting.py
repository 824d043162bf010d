"""The look of all figures: a colour-blind-safe palette, distinct markers, axes with units, text as typed.

A `TypedFigure` shows the names of runs, files and tokens literally, whatever characters they contain. Each run has
the same colour and marker in every figure that draws runs. `panel_grid` lays out one panel per run, in rows of
three.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter, Formatter, FuncFormatter

from tide_mega.data.frequency import BIN_GROUPS, NUM_BINS
from tide_mega.errors import printable

SUBSCRIPTS = str.maketrans("0123456789k", "₀₁₂₃₄₅₆₇₈₉ₖ")
"""For `str.translate`: turns digits into a table's index, as in E₁."""


class TypedFigure(Figure):
    """A figure in which `$` does not start mathematics and control characters are escaped.

    Tick numbers are left to matplotlib, such as powers of 10 on a logarithmic axis. All other text is shown
    literally: write E₁, not $E_1$.
    """

    def draw(self, renderer: Any) -> None:
        """Draw the figure; matplotlib calls it whenever a figure is written or measured."""
        numbers: set[Text] = set()
        for axis in self.findobj(Axis):
            numbers |= _numbers(axis)
        for text in self.findobj(Text):
            if text not in numbers:
                text.set_parse_math(False)
                text.set_text(_typed(text.get_text()))
        super().draw(renderer)


class _TypedNames(Formatter):
    """Wraps a formatter whose labels are names."""

    def __init__(self, names: Formatter) -> None:
        self._names = names

    def __call__(self, x: float, pos: int | None = None) -> str:
        return _typed(self._names(x, pos)).replace("$", r"\$")


def _numbers(axis: Axis) -> set[Text]:
    """Return the texts of an axis that matplotlib writes itself."""
    # Drawing recreates the ticks and loses settings of their labels, so the formatter has to escape the text.
    for which in (axis.major, axis.minor):
        if isinstance(which.formatter, FixedFormatter | FuncFormatter):
            which.formatter = _TypedNames(which.formatter)
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    return {axis.offsetText, *(text for tick in ticks for text in (tick.label1, tick.label2))}


def _typed(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


GREY = "#4d4d4d"
"""The baseline's, whose lines are dashed."""
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""The colour-blind-safe palette of Okabe and Ito."""
MARKERS = "osD^vP"
HEAT, DIVERGING = "cividis", "PuOr_r"
"""Colour maps: ordered values, and values around 0."""


def new_figure(width: float, height: float) -> Figure:
    """Make an empty `TypedFigure`; size in inches."""
    figure = TypedFigure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def panels(
    columns: int, rows: int = 1, *, width: float = 5.2, height: float = 4.2
) -> tuple[Figure, np.ndarray]:
    """Make a figure of panels; width and height of each in inches; axes [rows, columns]."""
    figure = new_figure(width * columns, height * rows)
    return figure, figure.subplots(rows, columns, squeeze=False)


def colours(number: int) -> list[str]:
    """Return one colour per series, repeating the palette."""
    return list(islice(cycle(PALETTE), number))


def label(axis: Axes, title: str, x: str, y: str) -> None:
    """Set title and axis labels (with units); remove the top and right spines."""
    axis.set_title(title)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.spines[["top", "right"]].set_visible(False)


def decile_axis(axis: Axes, of: str = "token") -> None:
    """Set up the x axis for frequency deciles, rarest first, with rare, mid and common marked."""
    low = -0.5
    for i, (role, deciles) in enumerate(BIN_GROUPS.items()):
        high = low + len(deciles)
        if i % 2 == 0:
            axis.axvspan(low, high, color="#f2f2f2", zorder=0)
        axis.annotate(
            role,
            ((low + high) / 2, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, -4),
            textcoords="offset points",
            ha="center",
            va="top",
            color="#555555",
            fontsize=9,
        )
        low = high
    axis.set_xlim(-0.5, NUM_BINS - 0.5)
    names: Sequence[str] = ["0\nrarest", *map(str, range(1, NUM_BINS - 1)), f"{NUM_BINS - 1}\ncommonest"]
    axis.set_xticks(range(NUM_BINS), names)
    axis.set_xlabel(f"frequency decile of the {of}")


@dataclass(frozen=True)
class Line:
    """How a series looks."""

    colour: str
    marker: str
    dash: str = "-"


BASELINE = Line(GREY, "X", "--")


def line(index: int) -> Line:
    """Return the look of series `index`; there are 36 distinct ones."""
    turn = index // len(PALETTE)
    return Line(PALETTE[index % len(PALETTE)], MARKERS[(index + turn) % len(MARKERS)])


def lines(blocks: Sequence[int]) -> list[Line]:
    """Return the looks of runs, given their numbers of memory blocks; the first with 0 is the baseline."""
    base = next((i for i, number in enumerate(blocks) if number == 0), None)
    if base is None:
        return [line(i) for i in range(len(blocks))]
    return [BASELINE if i == base else line(i - (i > base)) for i in range(len(blocks))]


def legend(axis: Axes, *, inside: int = 4, place: str = "best", size: float = 9) -> None:
    """Add the legend: inside the axes for up to `inside` series, otherwise below, where it hides nothing."""
    number = len(axis.get_legend_handles_labels()[0])
    if number <= inside:
        axis.legend(frameon=False, fontsize=size, loc=place)
    else:
        axis.legend(
            frameon=False,
            fontsize=size,
            ncols=3,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.2),
            borderaxespad=0,
        )


COLUMNS = 3


def panel_grid(number: int) -> tuple[Figure, list[Axes]]:
    """Make a figure of `number` panels, without empty ones."""
    columns = min(number, COLUMNS)
    figure, axes = panels(columns, -(-number // columns))
    for empty in axes.flat[number:]:
        empty.remove()
    return figure, list(axes.flat[:number])
