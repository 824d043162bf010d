"""A section, the result of one diagnostic: sentences, data tables and figures, and how it is stored.

On disk it is a folder with `section.json`, a CSV file for every table, and a PNG and an SVG of every figure.
"""

import csv
import io
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from tide_mega.errors import PlaceError
from tide_mega.files import json_values, read_json, regular_file, write_bytes, write_json
from tide_mega.lab.figures.registry import Diagnostic

Cell = str | int | float | bool | None
"""A table's entry; None for no value."""


@dataclass(frozen=True)
class DataTable:
    """Rows of a CSV file; column names include the unit, as in `loss (nats)`."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"a row has {len(row)} cells and there are {len(self.columns)} columns: {row}"
                )

    @classmethod
    def of(cls, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> "DataTable":
        """Build it from any sequences."""
        return cls(tuple(columns), tuple(tuple(row) for row in rows))


@dataclass(frozen=True)
class Section:
    """One part of the report; its name is in `registry.py`."""

    paper: str
    """What the paper shows, with its numbers: one or two sentences."""
    findings: tuple[str, ...]
    """What these runs show, each a sentence with its numbers and units."""
    tables: Mapping[str, DataTable]
    """Data by file name without suffix."""
    figures: Mapping[str, Figure] = field(default_factory=dict)
    """Figures by file name without suffix."""
    notes: tuple[str, ...] = ()
    """What was left out and why, and cautions."""


SECTION_FILE = "section.json"
_SUFFIXES = {".json", ".csv", ".png", ".svg"}


@dataclass(frozen=True)
class SavedSection:
    """A section read back from disk; its figures are files."""

    folder: Path
    of: Diagnostic
    """Its entry in the registry, which is not stored in a file."""
    paper: str
    findings: tuple[str, ...]
    notes: tuple[str, ...]
    tables: dict[str, DataTable]
    figures: tuple[str, ...]
    """Names: `<name>.png` and `<name>.svg` lie in `folder`."""
    identity: dict[str, Any]
    """What it was made from (`identity_of`); if unchanged, the section is up to date."""
    seconds: float
    """Time it took to make."""


def save(
    section: Section, of: Diagnostic, folder: Path, identity: dict[str, Any], seconds: float
) -> SavedSection:
    """Replace the section in `folder`; section.json is written last, so that a partial section does not count.

    Raises:
        PlaceError: the folder contains something that no analysis wrote.
    """
    _clear(folder)
    folder.mkdir(parents=True)
    for name, table in section.tables.items():
        write_bytes(folder / f"{name}.csv", to_csv(table).encode())
    with matplotlib.rc_context({"svg.hashsalt": of.name}):  # so that equal figures give equal files
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
    write_json(folder / SECTION_FILE, json_values(content))
    return saved


def _clear(folder: Path) -> None:
    """Remove a section's folder; if it is a link, only the link."""
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
    """Read what `save` wrote; None if it is incomplete, or a link."""
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
                regular_file(
                    folder, f"{name}.{suffix}"
                )  # a link would make the report show files from elsewhere
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
