"""The dashboard's sections as figures, and every series as CSV."""

import csv
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tide_mega.dashboard.history import RunHistory
from tide_mega.dashboard.layout import SECTIONS
from tide_mega.dashboard.lines import draw_chart, run_styles
from tide_mega.dashboard.panel import Section, charts
from tide_mega.data.atomic import write_bytes
from tide_mega.plotting.style import panels

COLUMNS = 3


def save_plots(
    runs: Sequence[RunHistory],
    folder: Path,
    x: str = "tokens",
    progress: Callable[[str], object] = lambda said: None,
) -> list[Path]:
    """Write a PNG and an SVG of every section that has data, and `series.csv`.

    Args:
        runs: with different labels.
        folder: made where it is absent.
        x: tokens or step.
        progress: is told each file name.
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
        figure.set_layout_engine("none")  # laid out, once for both files
        for suffix in ("png", "svg"):
            image = io.BytesIO()
            figure.savefig(image, format=suffix)
            written.append(folder / f"{stem}.{suffix}")
            write_bytes(written[-1], image.getvalue())
        progress(f"{stem}.png and .svg")
    return written


def draw(section: Section, runs: Sequence[RunHistory], x: str = "tokens") -> Figure | None:
    """Draw the panels of a section for which a run has numbers; None if there are none."""
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
    """Every metric of every run in long form, in full precision; nothing left out for want of a panel."""
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
