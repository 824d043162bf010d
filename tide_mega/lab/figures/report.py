"""The report: one HTML file with everything in it, each figure beside what the paper shows.

`report.html.jinja` has the page; values reach it unescaped and are escaped there.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

import tide_mega
from tide_mega.config.sizes import count_parameters
from tide_mega.files import write_bytes
from tide_mega.lab.figures.section import Cell, DataTable, SavedSection
from tide_mega.trained.run import TrainedRun

LARGEST_SVG = 2_000_000
"""Bytes; a larger figure goes in as PNG."""
LONGEST_TABLE = 200
"""Rows shown; the CSV file has all."""


@dataclass(frozen=True)
class Missing:
    """A diagnostic without a section."""

    name: str
    shows: str
    reason: str


def write_report(
    path: Path, runs: Sequence[TrainedRun], sections: Sequence[SavedSection], missing: Sequence[Missing]
) -> None:
    """Write the report as one file that needs nothing beside it."""
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["shown"] = show
    page = pages.get_template("report.html.jinja").render(
        title="TIDE diagnostics: " + ", ".join(run.label for run in runs),
        runs=_runs(runs),
        sections=sections,
        missing=missing,
        version=tide_mega.__version__,
        data_url=_data_url,
        shortened=lambda table: DataTable(table.columns, table.rows[:LONGEST_TABLE]),
        longest_table=LONGEST_TABLE,
    )
    write_bytes(path, page.encode())


def _runs(runs: Sequence[TrainedRun]) -> DataTable:
    rows = []
    for run in runs:
        count = count_parameters(run.config.model, run.config.memory)
        model = run.config.model
        shape = f"{model.num_layers} × {model.hidden_size}"
        rows.append(
            (
                run.label,
                run.num_blocks,
                shape,
                model.vocab_size,
                count.base,
                count.total,
                run.step,
                run.tokens,
            )
        )
    columns = ("run", "K", "layers × width", "V", "base parameters", "with memory", "step", "training tokens")
    return DataTable.of(columns, rows)


def _data_url(section: SavedSection, figure: str) -> str:
    path, kind = section.folder / f"{figure}.svg", "svg+xml"
    if path.stat().st_size > LARGEST_SVG:
        path, kind = section.folder / f"{figure}.png", "png"
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def show(cell: Cell) -> str:
    """Return a value as a reader wants it: thousands separated, four significant digits."""
    if cell is None:
        return "–"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, float):
        if cell.is_integer() and abs(cell) < 1e15:
            return f"{cell:,.0f}"
        return f"{cell:.3e}" if abs(cell) >= 1e6 or abs(cell) < 1e-3 else f"{cell:,.4g}"
    return cell
