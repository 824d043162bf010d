"""Draws the dashboard's sections as figures, and writes every series as CSV.

In a chart colour and marker tell the metrics apart and dashes the runs, also without colour vision.
"""

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from tide_mega.files import write_bytes
from tide_mega.lab.dashboard.history import RunHistory
from tide_mega.lab.dashboard.layout import SECTIONS
from tide_mega.lab.dashboard.panel import Chart, Section, charts
from tide_mega.lab.plotting import COLUMNS, GREY, HEAT, MARKERS, PALETTE, label, panels

DASHES: tuple[Any, ...] = ("-", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (2, 4)))
BASELINE_DASHES: tuple[Any, ...] = ("--", (0, (1, 3)), (0, (5, 5)))
X_LABELS = {"tokens": "training tokens", "step": "optimizer steps"}
MOST_IN_LEGEND = 12
MOST_THICK = 40
"""Number of lines in a chart beyond which they are thin and without markers."""
MOST_MARKED = 40
"""Most points of a line that all get a marker."""
_LIGHTEST = 0.9
"""Upper end of the colour map: beyond it yellow is faint on white."""
_SMALL = 7.5


@dataclass(frozen=True)
class RunStyle:
    """Style of a run's lines; the colour is used if the chart has one metric."""

    colour: str
    dashes: Any


def run_styles(runs: Sequence[RunHistory]) -> list[RunStyle]:
    """Choose a style for each run; beside runs with memory, a baseline is grey and dashed."""
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
    """Return colours of `number` metrics: dark to light if they are ordered, or too many for the palette."""
    if ordered or number > len(PALETTE):
        return [colormaps[HEAT](at) for at in np.linspace(0, _LIGHTEST, number)]
    return list(PALETTE[:number])


def in_legend(number: int) -> list[int]:
    """Return which lines the legend names: all, or some evenly spaced, including both ends."""
    if number <= MOST_IN_LEGEND:
        return list(range(number))
    return sorted({round(i) for i in np.linspace(0, number - 1, 8)})


def draw_chart(
    axis: Axes, chart: Chart, runs: Sequence[RunHistory], styles: Sequence[RunStyle], x: str
) -> None:
    """Draw every metric of every run over `x`, tokens or step; non-finite values leave gaps."""
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


def save_plots(
    runs: Sequence[RunHistory],
    folder: Path,
    x: str = "tokens",
    progress: Callable[[str], object] = lambda said: None,
) -> list[Path]:
    """Write a PNG and an SVG of every section that has data, and `series.csv`.

    Args:
        runs: with distinct labels.
        folder: created if absent.
        x: tokens or step.
        progress: called with each file name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "series.csv"]
    write_bytes(written[0], series_csv(runs).encode())
    progress(written[0].name)
    for number, section in enumerate(SECTIONS, start=1):
        figure = draw(section, runs, x)
        if figure is None:
            continue
        stem = f"{number}_{section.title.lower().replace(':', '').replace(' ', '_')}"
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once, for both files
        for suffix in ("png", "svg"):
            image = io.BytesIO()
            figure.savefig(image, format=suffix)
            written.append(folder / f"{stem}.{suffix}")
            write_bytes(written[-1], image.getvalue())
        progress(f"{stem}.png and .svg")
    return written


def draw(section: Section, runs: Sequence[RunHistory], x: str = "tokens") -> Figure | None:
    """Draw the panels of a section for which a run has finite values; None if there are none."""
    drawable = [{n for n in run.names() if np.isfinite(run.series(n).value).any()} for run in runs]
    drawn = [chart for panel in section.panels for chart in charts(panel, set().union(*drawable))]
    if not drawn:
        return None
    styles = run_styles(runs)
    columns = min(COLUMNS, len(drawn))
    figure, axes = panels(columns, math.ceil(len(drawn) / columns), width=5.4, height=3.3)
    for axis, chart in zip(axes.flat, drawn, strict=False):
        draw_chart(axis, chart, runs, styles, x)
    for axis in list(axes.flat)[len(drawn) :]:
        axis.remove()
    figure.suptitle(section.title if len(runs) > 1 else f"{section.title} – {runs[0].label}", fontsize=14)
    if len(runs) > 1:
        shown = {name for chart in drawn for name in chart.lines}
        handles = [
            Line2D([], [], color=style.colour, linestyle=style.dashes, linewidth=2, label=run.label)
            for run, style, names in zip(runs, styles, drawable, strict=True)
            if names & shown
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, handlelength=5)
    return figure


def series_csv(runs: Sequence[RunHistory]) -> str:
    """Return every metric of every run in long form and full precision, including metrics without a panel."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("run", "metric", "step", "tokens", "value"))
    for run in runs:
        for name in run.names():
            series = run.series(name)
            writer.writerows(
                (run.label, name, step, tokens, repr(value))
                for step, tokens, value in zip(
                    series.step.tolist(), series.tokens.tolist(), series.value.tolist(), strict=True
                )
            )
    return text.getvalue()
