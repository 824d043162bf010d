"""How figures look: one palette for any colour vision, markers that differ too, axes with units."""

from collections.abc import Sequence
from itertools import cycle, islice

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tide_mega.data.frequency import BIN_GROUPS, NUM_BINS
from tide_mega.plotting.typed import TypedFigure

GREY = "#4d4d4d"
"""Of the baseline, which is dashed."""
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's."""
MARKERS = "osD^vP"
HEAT, DIVERGING = "cividis", "PuOr_r"
"""Colour maps: ordered values, and values around 0."""


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure of so many inches, which shows every text as it is typed."""
    figure = TypedFigure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def panels(
    columns: int, rows: int = 1, *, width: float = 5.2, height: float = 4.2
) -> tuple[Figure, np.ndarray]:
    """Make a figure of panels; axes [rows, columns]."""
    figure = new_figure(width * columns, height * rows)
    return figure, figure.subplots(rows, columns, squeeze=False)


def colours(number: int) -> list[str]:
    """Return colours for so many series."""
    return list(islice(cycle(PALETTE), number))


def label(axis: Axes, title: str, x: str, y: str) -> None:
    """Title and axis labels (with units), no frame above and right."""
    axis.set_title(title)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.spines[["top", "right"]].set_visible(False)


def decile_axis(axis: Axes, of: str = "token") -> None:
    """Make x the frequency deciles, rarest first, with rare, mid and common marked."""
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
