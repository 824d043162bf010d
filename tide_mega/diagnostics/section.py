"""What a diagnostic hands over: sentences, data as tables, figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from matplotlib.figure import Figure

Cell = str | int | float | bool | None
"""What stands in a table; None where there is no value."""


@dataclass(frozen=True)
class DataTable:
    """Rows of a CSV file; a column's name has its unit, `loss (nats)`."""

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
        """Take any sequences."""
        return cls(tuple(columns), tuple(tuple(row) for row in rows))


@dataclass(frozen=True)
class Section:
    """One part of the report; `registry.py` says what it is called."""

    paper: str
    """What the paper shows, with its numbers: one or two sentences."""
    findings: tuple[str, ...]
    """What these runs show, each a sentence with its numbers and units."""
    tables: Mapping[str, DataTable]
    """Data by file name without suffix."""
    figures: Mapping[str, Figure] = field(default_factory=dict)
    """Figures by file name without suffix."""
    notes: tuple[str, ...] = ()
    """What was left out, and why; what to be careful with."""
