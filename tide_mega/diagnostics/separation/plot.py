"""The distances as heat maps, pair by layer (Figure 2), and as lines with their difference (Figure 6).

Shapes: L layers, P pairs.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tide_mega.diagnostics.separation.measure import Separation
from tide_mega.plotting import style
from tide_mega.plotting.lines import Line

_MOST_TICKS = 14
_DISTANCE = "mean l2 distance"

Measured = Mapping[str, Mapping[str, Separation]]
"""By the run's label, and in it by category."""


def draw_lines(runs: Measured, looks: Mapping[str, Line], base: str | None, *, relative: bool) -> Figure:
    """Mean distance of every category by layer; below it what each run has more than the baseline.

    Args:
        runs: what was measured.
        looks: of each run.
        base: label of the baseline; without it or another run the lower row is left out.
        relative: show distances as a part of the states' mean norm.
    """
    categories = list(next(iter(runs.values())))
    compared = base if base is not None and len(runs) > 1 else None
    figure, axes = style.panels(len(categories), 1 if compared is None else 2, height=3.4)
    y = "mean distance / mean norm" if relative else f"{_DISTANCE} ‖hᵤ \N{MINUS SIGN} hᵥ‖"
    for column, category in enumerate(categories):
        curves_L = {
            label: of[category].relative_L if relative else of[category].mean_L for label, of in runs.items()
        }
        _lines(axes[0, column], curves_L, looks)
        style.label(axes[0, column], category, "layer", y if column == 0 else "")
        axes[0, column].set_ylim(bottom=0)
        if compared is not None:
            axis = axes[1, column]
            gains_L = {
                label: curve - curves_L[compared] for label, curve in curves_L.items() if label != compared
            }
            axis.axhline(0, color=style.GREY, linestyle="--", linewidth=1)
            _lines(axis, gains_L, looks)
            style.label(axis, "", "layer", f"difference from {compared}" if column == 0 else "")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False)
    return figure


def draw_heat(runs: Measured, pairs: Mapping[str, Sequence[str]], base: str | None) -> Figure:
    """Pair by layer: a row of panels for each run, and one for the last run's difference from the baseline.

    Args:
        runs: what was measured.
        pairs: names of each category's pairs.
        base: label of the run that the last one is compared with, if any.
    """
    categories, last = list(pairs), list(runs)[-1]
    most = max(len(names) for names in pairs.values())
    rows = len(runs) + (base is not None)
    figure, axes = style.panels(len(categories), rows, height=max(2.6, 1.0 + 0.2 * most))
    for column, category in enumerate(categories):
        panels_PL = {label: of[category].distance_PL for label, of in runs.items()}
        top = max(float(values.max()) for values in panels_PL.values())
        for row, (label, values_PL) in enumerate(panels_PL.items()):
            _heat(axes[row, column], values_PL, pairs[category], f"{label}: {category}", (0.0, top))
        if base is not None:
            gain_PL = panels_PL[last] - panels_PL[base]
            reach = float(np.abs(gain_PL).max())
            title = f"{last} minus {base}: {category}"
            _heat(axes[-1, column], gain_PL, pairs[category], title, (-reach, reach))
    return figure


def _lines(axis: Axes, curves_L: Mapping[str, NDArray[np.float64]], looks: Mapping[str, Line]) -> None:
    for label, values_L in curves_L.items():
        look = looks[label]
        axis.plot(
            range(len(values_L)), values_L, look.dash, marker=look.marker, color=look.colour, label=label
        )
    _layer_ticks(axis, max(len(values_L) for values_L in curves_L.values()))


def _heat(
    axis: Axes,
    values_PL: NDArray[np.float64],
    names: Sequence[str],
    title: str,
    bounds: tuple[float, float],
) -> None:
    low, high = bounds
    image = axis.imshow(
        values_PL,
        aspect="auto",
        cmap=style.DIVERGING if low < 0 else style.HEAT,
        vmin=low,
        vmax=high or 1.0,
        interpolation="nearest",
    )
    bar = axis.figure.colorbar(image, ax=axis, pad=0.02)
    bar.set_label("difference of distance" if low < 0 else _DISTANCE, fontsize=8)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("layer")
    axis.set_yticks(range(len(names)), names, fontsize=7)
    _layer_ticks(axis, values_PL.shape[1])


def _layer_ticks(axis: Axes, layers: int) -> None:
    """Whole layers, a few of them where there are many."""
    axis.set_xticks(range(0, layers, math.ceil(layers / _MOST_TICKS)))
