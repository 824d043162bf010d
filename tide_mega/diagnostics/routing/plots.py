"""Router weights drawn by decile and by layer.

Shapes: L layers, S slots with the deciles first, K blocks, J = K + 1 banks with the null bank last.
"""

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tide_mega.data.frequency import NUM_BINS
from tide_mega.plotting import style
from tide_mega.plotting.lines import Line

_MOST_TICKS, _MOST_NUMBERS = 14, 12
Weights = NDArray[np.float64]


def draw_null(null_LS: Mapping[str, Weights], looks: Mapping[str, Line]) -> Figure:
    """The null bank's weight by decile: in the last layer, and mean over layers; one line a run."""
    figure, axes = style.panels(2)
    for axis, title in zip(axes[0], ("last layer", "mean over layers"), strict=True):
        style.decile_axis(axis, "input token")
        for label, weights_LS in null_LS.items():
            weights_S = weights_LS[-1] if title == "last layer" else weights_LS.mean(0)
            look = looks[label]
            deciles = range(NUM_BINS)
            axis.plot(
                deciles, weights_S[:NUM_BINS], look.dash, marker=look.marker, color=look.colour, label=label
            )
        axis.margins(y=0.15)
        axis.set_ylim(0, 1.12 * axis.get_ylim()[1])  # room for the names of rare, mid and common
        axis.set_title(f"Null bank, {title}")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("mean router weight (0 to 1)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False)
    return figure


def draw_one_layer(weight_SJ: Weights, label: str, layer: int) -> Figure:
    """Blocks by decile as a heat map, and the null bank as bars."""
    blocks = weight_SJ.shape[1] - 1
    figure, axes = style.panels(2, height=max(4.2, 1.4 + 0.22 * blocks), width=6)
    heat, bars = axes[0]
    _heat(heat, weight_SJ[:NUM_BINS, :-1].T, "mean router weight")
    heat.set_yticks(range(blocks), [f"block {k}" for k in range(1, blocks + 1)], fontsize=8)
    _decile_columns(heat)
    heat.set_title(f"{label}: blocks, layer {layer}")
    style.decile_axis(bars, "input token")
    drawn = bars.bar(range(NUM_BINS), weight_SJ[:NUM_BINS, -1], color=style.PALETTE[0])
    bars.bar_label(drawn, fmt="%.3f", fontsize=7, padding=2)
    bars.margins(y=0.15)
    bars.set_title(f"{label}: null bank, layer {layer}")
    bars.set_ylabel("mean router weight (0 to 1)")
    bars.spines[["top", "right"]].set_visible(False)
    return figure


def draw_layers(null_LS: Weights, mean_LJ: Weights, label: str) -> Figure:
    """The null bank's weight by layer and decile, and every bank's mean weight by layer."""
    layers, banks = mean_LJ.shape
    figure, axes = style.panels(2, height=max(4.2, 1.4 + 0.2 * layers), width=6)
    by_decile, by_bank = axes[0]
    _heat(by_decile, null_LS[:, :NUM_BINS], "mean router weight")
    _decile_columns(by_decile)
    by_decile.set_title(f"{label}: null bank")
    _heat(by_bank, mean_LJ, "mean router weight")
    names = [*map(str, range(1, banks)), "null"]
    shown = [*range(0, banks - 1, math.ceil(banks / _MOST_TICKS)), banks - 1]
    by_bank.set_xticks(shown, [names[i] for i in shown])
    by_bank.set_xlabel("memory block")
    by_bank.set_title(f"{label}: all tokens")
    for axis in (by_decile, by_bank):
        axis.set_yticks(range(0, layers, math.ceil(layers / (2 * _MOST_TICKS))))
        axis.set_ylabel("layer")
    return figure


def _decile_columns(axis: Axes) -> None:
    names = ["0\nrarest", *map(str, range(1, NUM_BINS - 1)), f"{NUM_BINS - 1}\ncommonest"]
    axis.set_xticks(range(NUM_BINS), names)
    axis.set_xlabel("frequency decile of the input token")


def _heat(axis: Axes, values: Weights, unit: str) -> None:
    """A heat map, with its numbers where there is room for them."""
    image = axis.imshow(values, aspect="auto", cmap=style.HEAT, interpolation="nearest")
    axis.figure.colorbar(image, ax=axis, pad=0.02).set_label(unit, fontsize=8)
    if max(values.shape) > _MOST_NUMBERS:
        return
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            colour = "white" if value <= middle else "black"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
