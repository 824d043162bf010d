"""What each precision of the tables costs: on every text, and on rare, mid and common tokens."""

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tide_mega.data.frequency import BIN_GROUPS
from tide_mega.diagnostics.precision.measure import STORED, TRAINED, Precisions
from tide_mega.plotting import style
from tide_mega.plotting.lines import line

_GROUP_WIDTH = 0.8


def draw(of: Precisions, paper: Mapping[str, Mapping[str, float]]) -> Figure:
    """Left the rise of perplexity by text, beside the paper's; right the change of the loss by frequency.

    `paper` has rises in per cent, by format and text.
    """
    figure, (axes,) = style.panels(2, width=6.2, height=4.6)
    by_text, by_role = axes
    heights = {text: [of.rise(kind, text) for kind in STORED] for text in of.texts}
    _bars(by_text, heights)
    first = True
    for place, kind in enumerate(STORED):
        for value in paper.get(kind, {}).values():
            by_text.plot(
                [place], [value], "x", color="black", markersize=7, label="paper, K = 8" if first else None
            )
            first = False
    style.label(by_text, f"{of.label}: rise of perplexity over fp32", "precision of the tables", "rise (%)")
    text = of.texts[0]
    whole = of.by_format[TRAINED][text]
    changes = {
        role: [getattr(of.by_format[kind][text], role) - getattr(whole, role) for kind in STORED]
        for role in BIN_GROUPS
        if getattr(whole, role) is not None
    }
    _bars(by_role, changes)
    style.label(
        by_role,
        f"{of.label}, {text}: loss by frequency",
        "precision of the tables",
        "change of the loss (nats)",
    )
    for axis in axes:
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(STORED)), STORED)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=9, loc="upper left")
    return figure


def _bars(axis: Axes, heights: Mapping[str, list[float]]) -> None:
    """Put the bars of each series side by side over every format."""
    width = _GROUP_WIDTH / max(1, len(heights))
    for i, (name, values) in enumerate(heights.items()):
        left = -_GROUP_WIDTH / 2 + width * (i + 0.5)
        places = [place + left for place in range(len(values))]
        axis.bar(places, values, width=0.9 * width, color=line(i).colour, label=name)
