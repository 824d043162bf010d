"""Panels that all look alike, one for each run, in rows of three."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tide_mega.plotting.style import panels

COLUMNS = 3


def panel_grid(number: int) -> tuple[Figure, list[Axes]]:
    """Make a figure of so many panels and none that stays empty."""
    columns = min(number, COLUMNS)
    figure, axes = panels(columns, -(-number // columns))
    for empty in axes.flat[number:]:
        empty.remove()
    return figure, list(axes.flat[:number])
