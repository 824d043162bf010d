"""Writes the comparison as text, CSV and a figure."""

import csv
import io
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tide_mega.files import write_bytes
from tide_mega.lab.plotting import GREY, PALETTE, new_figure
from tide_mega.lab.zero_shot.compare import format_cell, is_accuracy, is_perplexity
from tide_mega.lab.zero_shot.results import Cell, Column, Comparison
from tide_mega.text_table import aligned

NAME = "zero_shot"
_COLOURS = (GREY, *PALETTE)
_HATCHES = ("", "//", "..")
"""Distinguish bars whose colours repeat."""
_CHANCE = "chance"


def write_all(comparison: Comparison, folder: Path) -> list[Path]:
    """Write zero_shot.txt, .csv and, if there is a score, .png; return the files."""
    paths = [folder / f"{NAME}.txt", folder / f"{NAME}.csv"]
    write_bytes(paths[0], (as_text(comparison) + "\n").encode())
    write_bytes(paths[1], as_csv(comparison).encode())
    if comparison.columns and comparison.labels:
        picture = io.BytesIO()
        draw(comparison).savefig(picture, format="png")
        paths.append(folder / f"{NAME}.png")
        write_bytes(paths[-1], picture.getvalue())
    return paths


def as_text(comparison: Comparison) -> str:
    """Return an aligned table with chance below it, then findings, tasks left out and notes."""
    lines = []
    if comparison.columns:
        head = ["run", *(column.title for column in comparison.columns), "mean"]
        metrics = ["", *(column.metric for column in comparison.columns), ""]
        rows = [
            [
                label,
                *map(format_cell, cells, [column.metric for column in comparison.columns]),
                _or_dash(mean),
            ]
            for label, cells, mean in zip(comparison.labels, comparison.cells, comparison.means, strict=True)
        ]
        chances = [column.chance for column in comparison.columns]
        chance = ["chance", *map(_plain, chances), _plain(comparison.mean_chance)]
        lines.append(aligned([head, metrics], [*rows, chance], left=1))
    lines += [f"not evaluated: {task}: {reason}" for task, reason in comparison.absent.items()]
    lines += ["", *comparison.findings] if comparison.findings else []
    return "\n".join([*lines, "", *comparison.notes])


def _or_dash(cell: Cell | None) -> str:
    return "-" if cell is None else format_cell(cell)


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def as_csv(comparison: Comparison) -> str:
    """Return a line for each run and metric, with means and chance; tasks left out have their reason as status."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["run", "task", "metric", "unit", "value", "standard_error", "chance", "examples", "status"]
    )
    for label, cells, mean in zip(comparison.labels, comparison.cells, comparison.means, strict=True):
        for column, cell in zip(comparison.columns, cells, strict=True):
            unit = "%" if is_accuracy(column.metric) else ""
            words = map(_word, (cell.value, cell.stderr, column.chance))
            writer.writerow([label, column.task, column.metric, unit, *words, column.examples, "evaluated"])
        if mean is not None:
            words = map(_word, (mean.value, mean.stderr, comparison.mean_chance))
            writer.writerow([label, "mean", "accuracy", "%", *words, "", "evaluated"])
    for task, reason in comparison.absent.items():
        writer.writerow(["", task, *[""] * 6, f"not evaluated: {reason}"])
    return out.getvalue()


def _word(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def draw(comparison: Comparison) -> Figure:
    """Draw bars with standard errors: accuracies with chance marked, then perplexities, then other metrics."""
    panels: list[list[tuple[int, Column]]] = [[], [], []]
    for i, column in enumerate(comparison.columns):
        kind = 0 if is_accuracy(column.metric) else 1 if is_perplexity(column.metric) else 2
        panels[kind].append((i, column))
    with_mean = len(panels[0]) > 1
    groups = [len(panels[0]) + with_mean, *map(len, panels[1:])]
    bar = 0.2 + 0.12 * len(comparison.labels)
    widths = [max(2.4, n * max(1.1, bar)) for n in groups if n]
    figure = new_figure(sum(widths) + 1.6, 4.4)
    axes = iter(figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0])
    first = None
    if groups[0]:
        first = next(axes)
        titles = [column.title for _, column in panels[0]]
        chances = [column.chance for _, column in panels[0]]
        rows = [[cells[i] for i, _ in panels[0]] for cells in comparison.cells]
        if with_mean:
            titles, chances = [*titles, "mean"], [*chances, comparison.mean_chance]
            rows = [
                [*row, mean] for row, mean in zip(rows, comparison.means, strict=True) if mean is not None
            ]
        _bars(first, titles, rows, comparison.labels)
        _chances(first, chances)
        first.set_title("Zero-shot accuracy (higher is better)")
        first.set_ylabel("accuracy (%), ± standard error")
    for panel, title, unit in (
        (panels[1], "Perplexity (lower is better)", "perplexity"),
        (panels[2], "Other metrics", "value"),
    ):
        if not panel:
            continue
        axis = next(axes)
        rows = [[cells[i] for i, _ in panel] for cells in comparison.cells]
        _bars(axis, [_named(column) for _, column in panel], rows, comparison.labels, panel[0][1].metric)
        axis.set_title(title)
        axis.set_ylabel(f"{unit}, ± standard error")
        first = first or axis
    if first is not None:
        handles, labels = first.get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda i: labels[i] == _CHANCE)  # lines would come first
        handles, labels = [handles[i] for i in order], [labels[i] for i in order]
        columns = min(len(labels), 8)
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _named(column: Column) -> str:
    """Return a bar's name, with the metric unless the panel implies it."""
    return column.title if is_perplexity(column.metric) else f"{column.title}\n{column.metric}"


def _bars(
    axis: Axes, titles: list[str], rows: list[list[Cell]], labels: tuple[str, ...], metric: str = "acc"
) -> None:
    width = 0.8 / len(rows)
    for n, (label, row) in enumerate(zip(labels, rows, strict=True)):
        x = [i + width * (n - (len(rows) - 1) / 2) for i in range(len(titles))]
        bars = axis.bar(
            x,
            [cell.value for cell in row],
            0.92 * width,
            yerr=[cell.stderr or 0.0 for cell in row],
            error_kw={"elinewidth": 1.0, "capsize": 2},
            color=_COLOURS[n % len(_COLOURS)],
            hatch=_HATCHES[n // len(_COLOURS) % len(_HATCHES)],
            edgecolor="white",
            linewidth=0.5,
            label=label,
        )
        texts = [format_cell(Cell(cell.value, None), metric) for cell in row]
        white = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.85}
        turned = 90 if len(rows) > 2 else 0
        axis.bar_label(bars, texts, fontsize=7, padding=3, rotation=turned, bbox=white, zorder=5)
    low, high = axis.get_ylim()
    negative = any(cell.value < 0 for row in rows for cell in row)
    axis.set_ylim(1.12 * low if negative else 0, 1.12 * high)  # room for the numbers
    axis.set_xticks(range(len(titles)), titles)
    axis.set_xlim(-0.6, len(titles) - 0.4)
    axis.spines[["top", "right"]].set_visible(False)


def _chances(axis: Axes, chances: list[float | None]) -> None:
    named = False
    for i, chance in enumerate(chances):
        if chance is None:
            continue
        axis.plot(
            [i - 0.46, i + 0.46],
            [chance, chance],
            color="black",
            linestyle="--",
            linewidth=1.2,
            label=None if named else _CHANCE,
        )
        named = True
