"""Which colour and marker each run has, the same in every figure that draws runs; where their names stand."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from tide_mega.plotting.style import GREY, MARKERS, PALETTE


@dataclass(frozen=True)
class Line:
    """How a series looks."""

    colour: str
    marker: str
    dash: str = "-"


BASELINE = Line(GREY, "X", "--")


def line(index: int) -> Line:
    """Return the look of series `index`; 36 of them differ."""
    turn = index // len(PALETTE)
    return Line(PALETTE[index % len(PALETTE)], MARKERS[(index + turn) % len(MARKERS)])


def lines(blocks: Sequence[int]) -> list[Line]:
    """Return the looks of runs with so many memory blocks: the first without memory is the baseline."""
    base = next((i for i, number in enumerate(blocks) if number == 0), None)
    if base is None:
        return [line(i) for i in range(len(blocks))]
    return [BASELINE if i == base else line(i - (i > base)) for i in range(len(blocks))]


def legend(axis: Axes, *, inside: int = 4, place: str = "best", size: float = 9) -> None:
    """Name the series: within the axes up to `inside` of them, more below the axes, where they hide nothing."""
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
