"""Reads the text column of a parquet file."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow
import pyarrow.parquet

from tide_mega.data.prepare.inputs import Piece
from tide_mega.errors import printable

_ROWS = 1024
_LARGEST_GROUP = 2**31
"""Limit in bytes of the column in a row group, since a page, decoded as a whole, can be as large; usual row
groups have 2**27 to 2**30."""
_HEADER_BYTES = 12
_PAGE_HEADER = re.compile(rb"\x15[\x00-\x7f]\x15([\x80-\xff]{0,4}[\x00-\x7f])", re.DOTALL)


class DamagedFileError(Exception):
    """The file is not a readable parquet file with the requested column; the message says why."""


@dataclass(frozen=True)
class BadValue:
    """A value that cannot be turned into a string."""

    reason: str

    def __str__(self) -> str:
        return self.reason


def read_column(piece: Piece, column: str, longest: int) -> Iterator[tuple[int, object]]:
    """Yield (row number in the file from 0, value) for the piece's row groups; a null is None.

    Decodes at a time as many rows as take about `longest` bytes according to the file's metadata; if their sizes
    vary widely, at most a row group, whose size is bounded too.

    Raises:
        DamagedFileError: it is not a parquet file, lacks the column of strings, or has too large a row group.
        OSError: the file cannot be opened.
    """
    with Path(piece.file.path).open("rb") as opened:
        try:
            with pyarrow.parquet.ParquetFile(opened) as file:
                _check_column(file.schema_arrow, column)
                groups = range(file.num_row_groups)[piece.start : piece.stop]
                row = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
                for group in groups:
                    rows = _rows_at_a_time(opened, file.metadata.row_group(group), column, longest)
                    for batch in file.iter_batches(rows, row_groups=[group], columns=[column]):
                        # Looked up by name: besides a column "a.b", field "b" of a struct "a" may be read too.
                        for scalar in batch.column(column):
                            yield row, _value_of(scalar)
                            row += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise DamagedFileError(f"is not a readable parquet file: {_first_line(error)}") from error


def _rows_at_a_time(
    file: BinaryIO, group: pyarrow.parquet.RowGroupMetaData, column: str, longest: int
) -> int:
    """Return how many rows take about `longest` bytes, at their mean size and at the size of the dictionary."""
    chunks = (group.column(i) for i in range(group.num_columns))
    of_column = [chunk for chunk in chunks if chunk.path_in_schema == column]
    size = sum(chunk.total_uncompressed_size for chunk in of_column)
    most = max(longest, _LARGEST_GROUP)
    if size > most:
        raise DamagedFileError(
            f"has a row group of {size:,} bytes of {column!r}, uncompressed, and at most {most:,} are read at "
            "a time: write it with smaller row groups"
        )
    # A dictionary stores a value once, however many rows have it.
    repeated = max((_dictionary_size(file, chunk) for chunk in of_column), default=0)
    return max(1, min(_ROWS, longest * group.num_rows // max(size, 1), longest // max(repeated, 1)))


def _dictionary_size(file: BinaryIO, chunk: pyarrow.parquet.ColumnChunkMetaData) -> int:
    """Return the uncompressed bytes of a column chunk's dictionary; 0 without one.

    Source: PageHeader in parquet.thrift. Its first fields are the page's type and uncompressed size, i32 each, as
    Thrift's compact protocol writes them: a byte for type and field, and a zigzag varint.
    """
    if not chunk.has_dictionary_page:
        return 0
    place = file.tell()
    file.seek(chunk.dictionary_page_offset)
    head = file.read(_HEADER_BYTES)
    file.seek(place)
    found = _PAGE_HEADER.match(head)
    if found is None:
        return int(chunk.total_uncompressed_size)
    number = sum((byte & 0x7F) << 7 * i for i, byte in enumerate(found[1]))
    return number >> 1  # sizes are not negative


def _check_column(schema: pyarrow.Schema, column: str) -> None:
    count = schema.names.count(column)
    if count == 0:
        raise DamagedFileError(
            f"has no column {column!r}; its columns are {printable(', '.join(schema.names)) or 'none'} "
            "(option text_key chooses)"
        )
    if count > 1:
        raise DamagedFileError(
            f"has {count} columns called {column!r}, and which of them is the text cannot be known: rename them, "
            "or choose another with text_key"
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
