"""Reading documents out of one piece of an input file.

A record that cannot be read is yielded as a `BadRecord` that names its place, never dropped; what to do
about it is the caller's choice. Empty documents are yielded like any other.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tide_mega.data import parquet, zst
from tide_mega.data.units import Piece

OnBytes = Callable[[int], None]
"""Called with the number of input bytes read since the last call."""
_SHOWN_KEYS = 10


@dataclass(frozen=True)
class Document:
    """One document's text, which UTF-8 can encode."""

    text: str


@dataclass(frozen=True)
class BadRecord:
    """A file or a record that cannot be read."""

    source: str
    """The file's name, with a line or row number where there is one."""
    reason: str


def read_piece(piece: Piece, text_key: str, on_bytes: OnBytes) -> Iterator[Document | BadRecord]:
    """Yields the piece's documents in order, and a `BadRecord` for each file or record that is bad."""
    readers = {"text": _read_text, "jsonl": _read_jsonl, "jsonl.zst": _read_zst, "parquet": _read_parquet}
    try:
        yield from readers[piece.file.kind](piece, text_key, on_bytes)
    except OSError as error:
        yield BadRecord(piece.file.name, f"cannot be read: {error.strerror or error}")


def _read_text(piece: Piece, text_key: str, on_bytes: OnBytes) -> Iterator[Document | BadRecord]:
    raw = Path(piece.file.path).read_bytes()
    on_bytes(len(raw))
    nul = raw.find(b"\0")
    if nul >= 0:
        yield BadRecord(piece.file.name, f"has a NUL byte at offset {nul}, so it is no UTF-8 text but binary")
        return
    try:
        yield Document(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        yield BadRecord(piece.file.name, _invalid_utf8(error, "offset"))


def _read_jsonl(piece: Piece, text_key: str, on_bytes: OnBytes) -> Iterator[Document | BadRecord]:
    """Reads the lines that begin within [start, stop): each line of the file belongs to one piece."""
    path = Path(piece.file.path)
    stop = piece.file.size if piece.stop is None else piece.stop
    with path.open("rb") as file:
        offset = piece.start
        if offset > 0:
            file.seek(offset - 1)
            offset += len(file.readline()) - 1
        first_line_offset, lines_before, count = offset, None, 0
        while offset < stop:
            line = file.readline()
            if not line:
                break
            record = parse_json_line(line.removeprefix(b"\xef\xbb\xbf") if offset == 0 else line, text_key)
            if isinstance(record, str):
                if lines_before is None:
                    lines_before = _count_lines(path, first_line_offset)
                yield BadRecord(f"{piece.file.name}:{lines_before + count + 1}", record)
            elif record is not None:
                yield record
            offset += len(line)
            count += 1
            on_bytes(len(line))


def _read_zst(piece: Piece, text_key: str, on_bytes: OnBytes) -> Iterator[Document | BadRecord]:
    number = 0
    try:
        for number, line in enumerate(zst.read_lines(Path(piece.file.path), on_bytes), start=1):
            record = parse_json_line(line, text_key)
            if isinstance(record, str):
                yield BadRecord(f"{piece.file.name}:{number}", record)
            elif record is not None:
                yield record
    except zst.DamagedStreamError as error:
        yield BadRecord(piece.file.name, f"{error} after {number} whole lines; what follows them is lost")


def _read_parquet(piece: Piece, text_key: str, on_bytes: OnBytes) -> Iterator[Document | BadRecord]:
    try:
        for row, value in parquet.read_column(piece, text_key):
            problem = value if isinstance(value, parquet.BadValue) else _problem_of(value)
            if problem is not None:
                yield BadRecord(f"{piece.file.name}, row {row}", str(problem))
            else:
                yield Document(str(value))
    except parquet.DamagedFileError as error:
        yield BadRecord(piece.file.name, str(error))
    on_bytes(piece.size)


def parse_json_line(line: bytes, text_key: str) -> Document | str | None:
    """Parses one line: a document, or the reason why it is none, or None for a blank line."""
    if not line.strip():
        return None
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _invalid_utf8(error, "byte of the line")
    except json.JSONDecodeError as error:
        return f"is not JSON: {error.msg} at column {error.colno}"
    except RecursionError:
        return "is JSON nested too deeply to be read"
    except ValueError as error:  # integers beyond Python's limit of digits
        return f"is not JSON that can be read: {error}"
    if not isinstance(value, dict):
        return f"is a JSON {type(value).__name__}, not an object"
    if text_key not in value:
        keys = ", ".join(repr(key) for key in list(value)[:_SHOWN_KEYS])
        return f"has no key {text_key!r}; its keys are {keys or 'none'} (option text_key chooses)"
    text = value[text_key]
    problem = _problem_of(text)
    return problem if problem is not None else Document(text)


def _problem_of(text: object) -> str | None:
    if not isinstance(text, str):
        return f"its text is of type {type(text).__name__}, not a string"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"its text has a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}"
    return None


def _invalid_utf8(error: UnicodeDecodeError, where: str) -> str:
    return f"is not UTF-8: byte 0x{error.object[error.start]:02x} at {where} {error.start}"


def _count_lines(path: Path, stop: int) -> int:
    """Newlines in the first `stop` bytes."""
    count = 0
    with path.open("rb") as file:
        while stop > 0 and (chunk := file.read(min(stop, 2**20))):
            count += chunk.count(b"\n")
            stop -= len(chunk)
    return count
