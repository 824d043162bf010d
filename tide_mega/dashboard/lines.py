"""One chart: colour and marker say which metric, dashes which run, for any colour vision."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from tide_mega.dashboard.history import RunHistory
from tide_mega.dashboard.panel import Chart
from tide_mega.plotting.style import GREY, HEAT, MARKERS, PALETTE, label

DASHES: tuple[Any, ...] = ("-", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (2, 4)))
BASELINE_DASHES: tuple[Any, ...] = ("--", (0, (1, 3)), (0, (5, 5)))
X_LABELS = {"tokens": "training tokens", "step": "optimizer steps"}
MOST_IN_LEGEND = 12
MOST_THICK = 40
"""Lines of a chart; more are drawn thin and without markers."""
MOST_MARKED = 40
"""Points of a line that all get a marker."""
_LIGHTEST = 0.9
"""Beyond it the colour map's yellow is faint on white."""
_SMALL = 7.5


@dataclass(frozen=True)
class RunStyle:
    """What a run's lines have in common; the colour where the chart has one metric."""

    colour: str
    dashes: Any


def run_styles(runs: Sequence[RunHistory]) -> list[RunStyle]:
    """Choose a style for each run; among runs with memory a baseline is grey and dashed."""
    compared = any(run.has_memory for run in runs)
    styles: list[RunStyle] = []
    for run in runs:
        grey = sum(style.colour == GREY for style in styles)
        i = len(styles) - grey
        if compared and not run.has_memory:
            styles.append(RunStyle(GREY, BASELINE_DASHES[grey % len(BASELINE_DASHES)]))
        else:
            styles.append(RunStyle(PALETTE[i % len(PALETTE)], DASHES[i % len(DASHES)]))
    return styles


def line_colours(number: int, *, ordered: bool) -> list[Any]:
    """Colours of so many metrics: dark to light where they have an order, or are many."""
    if ordered or number > len(PALETTE):
        return [colormaps[HEAT](at) for at in np.linspace(0, _LIGHTEST, number)]
    return list(PALETTE[:number])


def in_legend(number: int) -> list[int]:
    """Which of so many lines the legend names: all, or some at even distances with both ends."""
    if number <= MOST_IN_LEGEND:
        return list(range(number))
    return sorted({round(i) for i in np.linspace(0, number - 1, 8)})


def draw_chart(
    axis: Axes, chart: Chart, runs: Sequence[RunHistory], styles: Sequence[RunStyle], x: str
) -> None:
    """Draw every metric of every run over `x`, tokens or step; what is not finite leaves a gap."""
    single, points = len(chart.lines) == 1, chart.panel.points
    crowded = len(chart.lines) > MOST_THICK
    colours = line_colours(len(chart.lines), ordered=bool(chart.panel.of))
    markers = ["."] if single else [MARKERS[i % len(MARKERS)] for i in range(len(colours))]
    drawn = []
    for name, colour, marker in zip(chart.lines, colours, markers, strict=True):
        for run, style in zip(runs, styles, strict=True):
            series = run.series(name)
            value = np.where(np.isfinite(series.value), series.value, np.nan)
            drawn.append(value)
            many = len(value) > MOST_MARKED and not points
            axis.plot(
                getattr(series, x),
                value,
                color=style.colour if single or points else colour,
                linestyle="" if points else style.dashes,
                linewidth=0.7 if crowded else 1.3,
                marker="" if crowded or (single and many) else marker,
                markersize=6 if single else 3.5,
                markevery=max(1, len(value) // 8) if many else 1,
            )
    (only, *_) = chart.lines.values()
    named = single and len(chart.panel.lines) != 1
    label(axis, f"{chart.title} – {only}" if named else chart.title, X_LABELS[x], chart.panel.unit)
    axis.title.set_fontsize(11)
    axis.grid(color="#e6e6e6", linewidth=0.6)
    axis.set_axisbelow(True)
    _scale(axis, np.concatenate(drawn), log=chart.panel.log_y)
    if not single:
        _legend(
            axis, chart, [GREY] * len(colours) if points else colours, ["" if crowded else m for m in markers]
        )


def _scale(axis: Axes, values: np.ndarray, *, log: bool) -> None:
    axis.xaxis.set_major_formatter(FuncFormatter(lambda number, _: short_number(number)))
    finite = values[np.isfinite(values)]
    if not finite.any():
        axis.set_ylim(-0.05, 1)
    elif log and (finite > 0).all() and finite.max() > 10 * finite.min():
        axis.set_yscale("log")
    elif np.abs(finite).max() >= 1e4:
        axis.yaxis.set_major_formatter(FuncFormatter(lambda number, _: short_number(number)))


def short_number(number: float) -> str:
    """Write a large number with k, M, B (10^9) or T."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= unit:
            return f"{number / unit:g}{letter}"
    return f"{number:g}"


def _legend(axis: Axes, chart: Chart, colours: Sequence[Any], markers: Sequence[str]) -> None:
    names = list(chart.lines.values())
    chosen = in_legend(len(names))
    dashes = "" if chart.panel.points else "-"
    handles = [
        Line2D([], [], color=colours[i], linestyle=dashes, marker=markers[i], markersize=3.5, label=names[i])
        for i in chosen
    ]
    title = chart.panel.of if len(chosen) == len(names) else f"{chart.panel.of or 'line'}, of {len(names)}"
    axis.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(1.0, 1.02),
        frameon=False,
        fontsize=_SMALL,
        title_fontsize=_SMALL,
        title=title or None,
        handlelength=1.8,
        borderaxespad=0.2,
    )
