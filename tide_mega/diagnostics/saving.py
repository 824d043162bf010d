"""A section on disk: `section.json`, a CSV file for every table, PNG and SVG of every figure."""

import csv
import io
import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

from tide_mega.data.atomic import write_bytes, write_json
from tide_mega.diagnostics.section import Cell, DataTable, Section

SECTION_FILE = "section.json"


@dataclass(frozen=True)
class SavedSection:
    """What is left of a section once its figures are files."""

    folder: Path
    name: str
    shows: str
    title: str
    paper: str
    findings: tuple[str, ...]
    notes: tuple[str, ...]
    tables: dict[str, DataTable]
    figures: tuple[str, ...]
    """Names: `<name>.png` and `<name>.svg` lie in `folder`."""
    identity: dict[str, Any]
    """What it was made of (`identity_of`); the same means that nothing needs to be made again."""
    seconds: float
    """How long making it took."""


def save(section: Section, folder: Path, identity: dict[str, Any], seconds: float) -> SavedSection:
    """Write a section in place of what is in `folder`; section.json comes last, so that a torn one is none."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    for name, table in section.tables.items():
        write_bytes(folder / f"{name}.csv", to_csv(table).encode())
    with matplotlib.rc_context({"svg.hashsalt": section.name}):  # the same figure gives the same file
        for name, figure in section.figures.items():
            figure.savefig(folder / f"{name}.png", format="png")
            figure.savefig(folder / f"{name}.svg", format="svg", metadata={"Date": None})
    saved = SavedSection(
        folder,
        section.name,
        section.shows,
        section.title,
        section.paper,
        section.findings,
        section.notes,
        dict(section.tables),
        tuple(section.figures),
        identity,
        seconds,
    )
    content = asdict(saved)
    del content["folder"]
    write_json(folder / SECTION_FILE, _finite(content))
    return saved


def load(folder: Path) -> SavedSection | None:
    """Read what `save` wrote; None where there is nothing whole."""
    try:
        content = json.loads((folder / SECTION_FILE).read_text(encoding="utf-8"))
        content["tables"] = {name: DataTable.of(**table) for name, table in content["tables"].items()}
        for name in ("findings", "notes", "figures"):
            content[name] = tuple(content[name])
        saved = SavedSection(folder=folder, **content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    files = [folder / f"{figure}.{suffix}" for figure in saved.figures for suffix in ("png", "svg")]
    return saved if all(path.is_file() for path in files) else None


def to_csv(table: DataTable) -> str:
    """Return a table as CSV; None is an empty cell."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows([[_cell(cell) for cell in row] for row in table.rows])
    return out.getvalue()


def _cell(cell: Cell) -> Cell:
    return str(cell).lower() if isinstance(cell, bool) else cell


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become strings."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
