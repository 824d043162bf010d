"""Figures shared by the benchmarks: stacked bars beside a floor, in colours that any eye tells apart."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tide_mega.plotting import style

# Okabe and Ito's palette; hatches tell apart what it repeats.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#4d4d4d")
_HATCHES = ("", "//", "..")


def new_figure(columns: int, width: float = 6.0) -> Figure:
    """Return a figure whose `subplots` are one row of axes."""
    return style.new_figure(width * columns, 4.6)


def stacked(axis: Axes, labels: Sequence[str], parts: Mapping[str, Sequence[float]]) -> None:
    """Draw a stacked bar for each label; parts below 0 hang from the axis."""
    above, below = [0.0] * len(labels), [0.0] * len(labels)
    for number, (name, values) in enumerate(parts.items()):
        bottoms = [above[i] if value >= 0 else below[i] for i, value in enumerate(values)]
        axis.bar(
            range(len(labels)),
            values,
            0.7,
            bottom=bottoms,
            label=name,
            color=COLOURS[number % len(COLOURS)],
            hatch=_HATCHES[number // len(COLOURS) % len(_HATCHES)],
            edgecolor="white",
            linewidth=0.5,
        )
        above = [total + max(value, 0.0) for total, value in zip(above, values, strict=True)]
        below = [total + min(value, 0.0) for total, value in zip(below, values, strict=True)]
    axis.set_xticks(range(len(labels)), labels)
    axis.spines[["top", "right"]].set_visible(False)


def floor_marks(axis: Axes, floors: Sequence[float], label: str = "byte-count floor") -> None:
    """Draw a black line across each bar at its floor."""
    for number, floor in enumerate(floors):
        name = label if number == 0 else None
        axis.plot([number - 0.42, number + 0.42], [floor, floor], color="black", linewidth=2, label=name)
