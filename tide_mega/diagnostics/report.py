"""The report: one HTML file with everything in it, each diagnostic beside what the paper shows."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tide_mega
from tide_mega.config.sizes import count_parameters
from tide_mega.data.atomic import write_bytes
from tide_mega.diagnostics.saving import SavedSection
from tide_mega.diagnostics.section import Cell, DataTable
from tide_mega.trained.run import TrainedRun

LARGEST_SVG = 2_000_000
"""Bytes; a larger figure goes in as PNG."""
LONGEST_TABLE = 200
"""Rows shown; the CSV file has all."""

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""Of the page: no scripts, nothing from elsewhere."""
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 72rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; }
h2 { font-size: 1.25rem; margin-top: 3rem; border-top: 1px solid #ccc; padding-top: 1rem; }
h2 small { font-weight: normal; color: #555; margin-left: .5rem; }
nav ol { columns: 2; } nav small { color: #555; }
.sides { display: grid; grid-template-columns: 1fr 2fr; gap: 1rem 2rem; margin: 1rem 0; }
.sides h3 { font-size: .85rem; margin: 0; color: #555; text-transform: uppercase; letter-spacing: .05em; }
.sides p, .sides ul { margin: .3rem 0; } .sides ul { padding-left: 1.1rem; }
img { max-width: 100%; height: auto; display: block; margin: 1rem auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .6rem; text-align: right; border-bottom: 1px solid #e5e5e5; }
th { border-bottom: 1px solid #888; vertical-align: bottom; } th:first-child, td:first-child { text-align: left; }
td.text { text-align: left; }
.wide { overflow-x: auto; } details { margin: .5rem 0; } summary { cursor: pointer; color: #0072B2; }
.notes { color: #555; font-size: .9rem; }
@media (max-width: 50rem) { .sides { grid-template-columns: 1fr; } nav ol { columns: 1; } }
"""


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
    title = "TIDE diagnostics: " + ", ".join(run.label for run in runs)
    body = [
        f"<h1>{_text(title)}</h1>",
        _table(_runs(runs)),
        _contents(sections),
        *(_section(section) for section in sections),
        _missing(missing),
        f'<p class="notes">Made by tide_mega {tide_mega.__version__}. Paper: arXiv 2605.06216.</p>',
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
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


def _contents(sections: Sequence[SavedSection]) -> str:
    items = (
        f'<li><a href="#{_text(section.of.name)}">{_text(section.of.title)}</a> '
        f"<small>{_text(section.of.shows)}</small></li>"
        for section in sections
    )
    return f"<nav><ol>{''.join(items)}</ol></nav>"


def _section(section: SavedSection) -> str:
    findings = "".join(f"<li>{_text(finding)}</li>" for finding in section.findings)
    notes = "".join(f"<li>{_text(note)}</li>" for note in section.notes)
    tables = "".join(_details(name, table, section) for name, table in section.tables.items())
    of = section.of
    return (
        f'<section id="{_text(of.name)}"><h2>{_text(of.title)}<small>{_text(of.shows)}</small></h2>'
        f'<div class="sides"><div><h3>The paper</h3><p>{_text(section.paper)}</p></div>'
        f"<div><h3>These runs</h3><ul>{findings}</ul></div></div>"
        + "".join(_figure(section, name) for name in section.figures)
        + (f'<ul class="notes">{notes}</ul>' if notes else "")
        + tables
        + "</section>"
    )


def _figure(section: SavedSection, name: str) -> str:
    path, kind = section.folder / f"{name}.svg", "svg+xml"
    if path.stat().st_size > LARGEST_SVG:
        path, kind = section.folder / f"{name}.png", "png"
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{_text(section.of.title)}: {_text(name)}" src="data:image/{kind};base64,{data}">'


def _details(name: str, table: DataTable, section: SavedSection) -> str:
    shown = DataTable(table.columns, table.rows[:LONGEST_TABLE])
    rest = len(table.rows) - len(shown.rows)
    more = (
        f'<p class="notes">and {rest:,} more rows in {_text(section.of.name)}/{_text(name)}.csv</p>'
        if rest
        else ""
    )
    summary = f"{name.replace('_', ' ')} ({len(table.rows):,} rows, {section.of.name}/{name}.csv)"
    return f"<details><summary>{_text(summary)}</summary>{_table(shown)}{more}</details>"


def _table(table: DataTable) -> str:
    head = "".join(f"<th>{_text(column)}</th>" for column in table.columns)
    body = "".join(f"<tr>{''.join(map(_td, row))}</tr>" for row in table.rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _td(cell: Cell) -> str:
    kind = ' class="text"' if isinstance(cell, str) else ""
    return f"<td{kind}>{_text(show(cell))}</td>"


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


def _missing(missing: Sequence[Missing]) -> str:
    if not missing:
        return ""
    items = "".join(
        f"<li>{_text(gone.name)} ({_text(gone.shows)}): {_text(gone.reason)}</li>" for gone in missing
    )
    return f"<section><h2>Not shown</h2><ul>{items}</ul></section>"


def _text(value: object) -> str:
    return html.escape(str(value))
