"""A section on disk: `section.json`, a CSV file for every table, PNG and SVG of every figure."""

import csv
import io
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

from tide_mega.config.errors import PlaceError
from tide_mega.config.paths import regular_file
from tide_mega.config.stored import read_json
from tide_mega.data.atomic import write_bytes, write_json
from tide_mega.diagnostics.registry import Diagnostic
from tide_mega.diagnostics.section import Cell, DataTable, Section

SECTION_FILE = "section.json"
_SUFFIXES = {".json", ".csv", ".png", ".svg"}


@dataclass(frozen=True)
class SavedSection:
    """What is left of a section once its figures are files."""

    folder: Path
    of: Diagnostic
    """What it is called and shows: no file says it."""
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


def save(
    section: Section, of: Diagnostic, folder: Path, identity: dict[str, Any], seconds: float
) -> SavedSection:
    """Write a section in place of the one in `folder`; section.json comes last, so that a torn one is none.

    Raises:
        PlaceError: the folder has something that no analysis wrote.
    """
    _clear(folder)
    folder.mkdir(parents=True)
    for name, table in section.tables.items():
        write_bytes(folder / f"{name}.csv", to_csv(table).encode())
    with matplotlib.rc_context({"svg.hashsalt": of.name}):  # the same figure gives the same file
        for name, figure in section.figures.items():
            figure.savefig(folder / f"{name}.png", format="png")
            figure.savefig(folder / f"{name}.svg", format="svg", metadata={"Date": None})
    saved = SavedSection(
        folder,
        of,
        section.paper,
        section.findings,
        section.notes,
        dict(section.tables),
        tuple(section.figures),
        identity,
        seconds,
    )
    content = asdict(saved)
    del content["folder"], content["of"]
    write_json(folder / SECTION_FILE, _finite(content))
    return saved


def _clear(folder: Path) -> None:
    """Remove a section's folder; of one that is a link, the link."""
    if folder.is_symlink():
        folder.unlink()
    if not folder.exists():
        return
    if others := sorted(path.name for path in folder.iterdir() if path.suffix not in _SUFFIXES):
        raise PlaceError(
            f"{folder} has {others[0]}, which no analysis wrote: move it, or choose another out."
        )
    shutil.rmtree(folder)


def load(folder: Path, of: Diagnostic) -> SavedSection | None:
    """Read what `save` wrote; None where there is nothing whole, or a link."""
    if folder.is_symlink():
        return None
    try:
        content = read_json(folder, SECTION_FILE)
        content["tables"] = {name: DataTable.of(**table) for name, table in content["tables"].items()}
        for name in ("findings", "notes", "figures"):
            content[name] = tuple(content[name])
        saved = SavedSection(folder=folder, of=of, **content)
        for name in saved.figures:
            for suffix in ("png", "svg"):
                regular_file(folder, f"{name}.{suffix}")  # the report would show one from elsewhere
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return saved


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
