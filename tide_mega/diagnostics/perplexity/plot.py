"""Perplexity against training tokens as a figure: a panel a text, a line a run."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from tide_mega.diagnostics.curves.plot import token_unit
from tide_mega.diagnostics.perplexity.curves import TextCurve, baseline, relative_to, spread
from tide_mega.plotting.lines import Line, lines
from tide_mega.plotting.style import label, panels

_COLUMNS = 3
_MOST_MARKERS = 16
_LOG_FROM = 5.0
"""Ratio of the largest to the smallest perplexity from which the axis is logarithmic."""


def draw(by_text: Sequence[Sequence[TextCurve]]) -> Figure:
    """Draw the curves of each text; every run has the same look in all panels."""
    figure, axes, looks, scale = _grid(by_text, "perplexity")
    for axis, curves in zip(axes, by_text, strict=True):
        _draw_text(axis, curves, looks, scale)
    _legend(figure, axes[0])
    return figure


def draw_relative(by_text: Sequence[Sequence[TextCurve]]) -> Figure | None:
    """Draw how far each run's perplexity is from the baseline's; None without anything to compare."""
    compared = [
        curves
        for curves in by_text
        if (base := baseline(curves)) is not None
        and any(relative_to(curve, base) for curve in curves if curve is not base)
    ]
    if not compared:
        return None
    figure, axes, looks, scale = _grid(compared, "perplexity relative to the baseline (%)")
    for axis, curves in zip(axes, compared, strict=True):
        base = baseline(curves)
        assert base is not None
        axis.axhline(0, color=looks[base.label].colour, linestyle="--", linewidth=1, label=base.label)
        for curve in curves:
            if curve is not base:
                points = [point for point in relative_to(curve, base) if math.isfinite(point[1])]
                _plot(axis, curve, looks[curve.label], points, scale)
        axis.set_xlim(left=0)
    _legend(figure, axes[0])
    return figure


def _grid(
    by_text: Sequence[Sequence[TextCurve]], what: str
) -> tuple[Figure, list[Axes], dict[str, Line], float]:
    """Make a panel for each text; return them, the look of every run and by what to divide tokens."""
    runs = {curve.label: curve.num_blocks for curves in by_text for curve in curves}
    looks = dict(zip(runs, lines(list(runs.values())), strict=True))
    columns = 2 if len(by_text) == 4 else min(len(by_text), _COLUMNS)
    rows = math.ceil(len(by_text) / columns)
    figure, axes = panels(columns, rows, width=5.2 if columns > 1 else 6.4)
    scale, unit = token_unit(max(curve.last.tokens for curves in by_text for curve in curves))
    flat = list(axes.ravel())
    for axis, curves in zip(flat, by_text, strict=False):
        tokens = f"training tokens ({unit})" if unit else "training tokens"
        label(axis, f"{curves[0].text} ({curves[0].last.result.tokens:,} tokens)", tokens, what)
    for axis in flat[len(by_text) :]:
        axis.remove()
    return figure, flat[: len(by_text)], looks, scale


def _legend(figure: Figure, axis: Axes) -> None:
    """Put one legend under all panels, where no line passes."""
    columns = max(2, round(figure.get_figwidth() / 2.2))
    figure.legend(*axis.get_legend_handles_labels(), frameon=False, ncols=columns, loc="outside lower center")


def _draw_text(axis: Axes, curves: Sequence[TextCurve], looks: dict[str, Line], scale: float) -> None:
    base = baseline(curves)
    for curve in curves:
        points = [(point.tokens, point.result.perplexity) for point in curve.points]
        points = [point for point in points if math.isfinite(point[1])]
        _plot(axis, curve, looks[curve.label], points, scale)
        if curve is base and len(curves) > 1 and points:
            axis.axhline(
                points[-1][1],
                color=looks[curve.label].colour,
                linestyle=":",
                linewidth=1,
                zorder=0,
                label=f"{curve.label} at its end",
            )
    axis.set_xlim(left=0)
    _scale(axis, [point.result.perplexity for curve in curves for point in curve.points])


def _plot(
    axis: Axes, curve: TextCurve, look: Line, points: Sequence[tuple[int, float]], scale: float
) -> None:
    """Draw a line with a marker at every point, or where there are many at checkpoints or evenly."""
    at_checkpoint = {point.tokens for point in curve.points if not point.is_logged}
    marked: Sequence[int] = range(len(points))
    if len(points) > _MOST_MARKERS:
        measured = [i for i in marked if points[i][0] in at_checkpoint]
        marked = measured or spread(marked, _MOST_MARKERS)
    axis.plot(
        [tokens / scale for tokens, _ in points],
        [value for _, value in points],
        look.dash,
        marker=look.marker,
        markevery=list(marked),
        color=look.colour,
        linewidth=1.6,
        markersize=5.5,
        label=curve.label,
    )


def _scale(axis: Axes, values: list[float]) -> None:
    values = [value for value in values if math.isfinite(value)]
    if values and max(values) > _LOG_FROM * min(values):
        axis.set_yscale("log")
        span = math.log10(max(values) / min(values))
        steps = (1, 1.5, 2, 3, 4, 5, 6, 8) if span < 0.8 else (1, 2, 3, 5) if span < 2 else (1, 3)
        axis.yaxis.set_major_locator(LogLocator(subs=steps, numticks=20))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
