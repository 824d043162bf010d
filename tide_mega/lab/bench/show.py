"""Output shared by the benchmarks: text tables, number formats, and stacked bars beside a floor."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tide_mega.lab import plotting


def milliseconds(seconds: float) -> str:
    """Format seconds in ms, to about three digits."""
    value = 1e3 * seconds
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) >= 0.1 else f"{value:.4f}"


def megabytes(count: float) -> str:
    """Format bytes in units of 10^6."""
    return f"{count / 1e6:,.1f}"


# Okabe and Ito's palette, ordered for stacked neighbours; hatches distinguish repeated colours.
COLOURS = (*(plotting.PALETTE[i] for i in (0, 4, 2, 3, 5, 1)), "#F0E442", plotting.GREY)
_HATCHES = ("", "//", "..")


def new_figure(columns: int, width: float = 6.0) -> Figure:
    """Return a figure sized for one row of `columns` axes."""
    return plotting.new_figure(width * columns, 4.6)


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
