"""Curves of the training loss as a figure."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tide_mega.diagnostics.curves.points import Curve, difference, held_out_difference
from tide_mega.plotting.lines import Line, legend, lines
from tide_mega.plotting.style import label, panels

STEEP = 0.05
"""The first part of the tokens, whose steep fall may leave the picture."""
MOST_MARKERS = 40
_UNITS = ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))


def draw(curves: Sequence[Curve], looks_by_label: Mapping[str, Line] | None = None) -> Figure:
    """Losses, and with a baseline and others their differences to it.

    Looks are given where the curves are some of the runs that other figures show.
    """
    if looks_by_label is None:
        looks = lines([curve.num_blocks for curve in curves])
    else:
        looks = [looks_by_label[curve.label] for curve in curves]
    base = next((i for i, curve in enumerate(curves) if curve.num_blocks == 0), None)
    others = [i for i in range(len(curves)) if i != base]
    with_difference = base is not None and bool(others)
    figure, axes = panels(1 + with_difference, width=6.4, height=4.6)
    scale, unit = token_unit(max(float(curve.tokens[-1]) for curve in curves))
    x_label = f"training tokens ({unit})" if unit else "training tokens"
    for curve, look in zip(curves, looks, strict=True):
        _draw_loss(axes[0, 0], curve, look, scale)
    _end_axis(
        axes[0, 0],
        [
            *(_later(curve, curve.tokens, curve.smooth) for curve in curves),
            *(np.array(list(curve.held_out.values())) for curve in curves),
        ],
    )
    label(axes[0, 0], "Loss (line: training, markers: held-out)", x_label, "cross entropy (nats per token)")
    legend(axes[0, 0], inside=6)
    if with_difference and base is not None:
        axis = axes[0, 1]
        for i in others:
            _draw_difference(axis, curves[i], curves[base], looks[i], scale)
        gaps = [_later(curves[i], *difference(curves[i], curves[base])) for i in others]
        _end_axis(axis, [np.zeros(1), *gaps])
        axis.axhline(0, color=looks[base].colour, linestyle="--", linewidth=1, zorder=0)
        label(
            axis,
            f"Difference to {curves[base].label} (lower is better)",
            x_label,
            "difference (nats per token)",
        )
        legend(axis, inside=1)
    for axis in axes[0]:
        axis.set_xlim(left=0)
    return figure


def token_unit(largest: float) -> tuple[float, str]:
    """Return by what to divide token counts up to `largest`, and what the unit is called."""
    return next(((scale, unit) for scale, unit in _UNITS if largest >= scale), (1.0, ""))


def _draw_loss(axis: Axes, curve: Curve, look: Line, scale: float) -> None:
    if curve.window > 1:
        axis.plot(curve.tokens / scale, curve.loss, color=look.colour, linewidth=0.6, alpha=0.25)
    axis.plot(
        curve.tokens / scale, curve.smooth, look.dash, color=look.colour, linewidth=1.6, label=curve.label
    )
    _draw_markers(axis, curve.held_out, look, scale)


def _draw_difference(axis: Axes, curve: Curve, base: Curve, look: Line, scale: float) -> None:
    tokens, gaps = difference(curve, base)
    axis.plot(tokens / scale, gaps, look.dash, color=look.colour, linewidth=1.6, label=curve.label)
    _draw_markers(axis, held_out_difference(curve, base), look, scale)


def _draw_markers(axis: Axes, values: dict[int, float], look: Line, scale: float) -> None:
    every = -(-len(values) // MOST_MARKERS) or 1
    chosen = list(values.items())[::-1][::every]
    axis.plot(
        [tokens / scale for tokens, _ in chosen],
        [loss for _, loss in chosen],
        look.marker,
        color=look.colour,
        markeredgecolor="black",
        markeredgewidth=0.6,
        markersize=6,
    )


def _end_axis(axis: Axes, shown: Sequence[np.ndarray]) -> None:
    """Let the axis span these values alone, so that the curves can be told apart."""
    values = np.concatenate([part for part in shown if len(part)])
    low, high = float(values.min()), float(values.max())
    margin = 0.05 * (high - low) or 0.1
    axis.set_ylim(low - margin, high + margin)


def _later(curve: Curve, tokens: np.ndarray, values: np.ndarray) -> np.ndarray:
    """What follows the steep start."""
    return values[tokens >= STEEP * curve.tokens[-1]]
