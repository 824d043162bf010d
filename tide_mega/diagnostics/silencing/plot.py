"""Perplexity by silenced layer, one line a text. Shapes: L layers."""

import math
from collections.abc import Mapping
from typing import Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from tide_mega.plotting import style
from tide_mega.plotting.lines import line

_MOST_TICKS = 14
_WIDE = 20.0
"""Largest over median from which an axis is logarithmic."""


class Silenced(Protocol):
    """What is drawn of a text (`tide_mega.diagnostics.silencing.Silencing`)."""

    @property
    def loss(self) -> float:
        """Nats per token, with all memory."""

    @property
    def perplexity_L(self) -> NDArray[np.float64]:
        """Without the memory of one layer."""

    @property
    def rise_L(self) -> NDArray[np.float64]:
        """Per cent."""


def draw_silencing(label: str, by_text: Mapping[str, Silenced]) -> Figure:
    """Left the perplexity, with that of the whole model dashed; right its rise in per cent."""
    figure, axes = style.panels(2, width=6)
    absolute, relative = axes[0]
    for i, (name, of) in enumerate(by_text.items()):
        look = line(i)
        layers = range(len(of.rise_L))
        drawn = {"marker": look.marker, "color": look.colour, "label": name}
        absolute.axhline(math.exp(of.loss), color=look.colour, linestyle="--", linewidth=1)
        absolute.plot(layers, of.perplexity_L, look.dash, **drawn)
        relative.plot(layers, of.rise_L, look.dash, **drawn)
    relative.axhline(0, color=style.GREY, linestyle="--", linewidth=1)
    style.label(absolute, f"{label}: perplexity (dashed: nothing silenced)", "silenced layer", "perplexity")
    style.label(relative, f"{label}: rise of perplexity", "silenced layer", "rise (%)")
    for axis in axes[0]:
        _layers(axis, max(len(of.rise_L) for of in by_text.values()))
    _widen(absolute, np.concatenate([of.perplexity_L for of in by_text.values()]), around_zero=False)
    _widen(relative, np.concatenate([of.rise_L for of in by_text.values()]), around_zero=True)
    handles, labels = relative.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False)
    return figure


def _layers(axis: Axes, number: int) -> None:
    axis.set_xticks(range(0, number, math.ceil(number / _MOST_TICKS)))


def _widen(axis: Axes, values: NDArray[np.float64], *, around_zero: bool) -> None:
    """Make the axis logarithmic where one value towers above the others; around 0 it is linear up to 1."""
    size = np.abs(values[np.isfinite(values)])
    if not size.size or size.max() <= max(_WIDE * float(np.median(size)), _WIDE):
        return
    if around_zero:
        axis.set_yscale("symlog", linthresh=1.0)
        finite = values[np.isfinite(values)]
        axis.set_ylim(min(-1.0, 2 * finite.min()), max(1.0, 3 * finite.max()))
    else:
        axis.set_yscale("log")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
