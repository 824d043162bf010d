"""The text column of a parquet file."""

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow
import pyarrow.parquet

from tide_mega.data.units import Piece

_ROWS = 1024


class DamagedFileError(Exception):
    """The file is no readable parquet file with the wanted column; the message says why."""


@dataclass(frozen=True)
class BadValue:
    """A value that cannot be turned into a string."""

    reason: str

    def __str__(self) -> str:
        return self.reason


def read_column(piece: Piece, column: str) -> Iterator[tuple[int, object]]:
    """Yields (row number in the file from 0, value) of the piece's row groups; a null is None.

    Raises:
        DamagedFileError: the file cannot be read, or has no such column of strings.
    """
    try:
        with pyarrow.parquet.ParquetFile(piece.file.path) as file:
            _check_column(file.schema_arrow, column)
            groups = range(file.num_row_groups)[piece.start : piece.stop]
            row = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
            for group in groups:
                for batch in file.iter_batches(_ROWS, row_groups=[group], columns=[column]):
                    for scalar in batch.column(0):
                        yield row, _value_of(scalar)
                        row += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DamagedFileError(f"is not a readable parquet file: {_first_line(error)}") from error


def _check_column(schema: pyarrow.Schema, column: str) -> None:
    if column not in schema.names:
        raise DamagedFileError(
            f"has no column {column!r}; its columns are {', '.join(schema.names)} (option text_key chooses)"
        )
    kind = schema.field(column).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    types = pyarrow.types
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise DamagedFileError(f"has a column {column!r} of type {kind}, not of strings")


def _value_of(scalar: pyarrow.Scalar) -> object:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return BadValue(f"is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
