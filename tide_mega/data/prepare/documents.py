"""Reads the documents in one piece of an input file.

A record that cannot be read is yielded as a `BadRecord` that names its place and never dropped; what to do about
it is the caller's choice. Empty documents are yielded like any other. A document above the size limit is a
`BadRecord`, and no more than the limit of it is held in memory.
"""

import codecs
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tide_mega.data.prepare import compressed, parquet
from tide_mega.data.prepare.compressed import MAX_DOCUMENT_BYTES, read_line, skip_line
from tide_mega.data.prepare.inputs import Piece

OnBytes = Callable[[int], None]
_SHOWN_KEYS = 10
_HEAD = 2**16
"""Bytes examined to tell a single JSON value from JSON lines."""
_MARK = "\ufeff"
"""The byte order mark."""
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_IS_UTF16 = "is UTF-16 by its byte order mark: convert it to UTF-8, as `iconv -f UTF-16 -t UTF-8` does"
_BLANK = " \t\n\r\v\f"
"""The characters that `bytes.strip` removes."""


@dataclass(frozen=True)
class Document:
    """One document's text, encodable as UTF-8."""

    text: str


@dataclass(frozen=True)
class BadRecord:
    """A file or a record that cannot be read."""

    source: str
    """File name, with line or row number if there is one."""
    reason: str


def read_piece(
    piece: Piece, text_key: str, on_bytes: OnBytes, longest: int = MAX_DOCUMENT_BYTES
) -> Iterator[Document | BadRecord]:
    """Yield the piece's documents in order, and a `BadRecord` for each bad file or record.

    Args:
        piece: what to read.
        text_key: key of a JSON line, or column of a parquet file, with the text.
        on_bytes: called with the number of input bytes read since the last call.
        longest: limit in bytes of a document, and of the JSON line that contains it: option `max_document_bytes`.
    """
    if piece.file.problem:
        yield BadRecord(piece.file.name, piece.file.problem)
        return
    kind, _, compression = piece.file.kind.partition(".")
    readers = {
        "text": _read_text,
        "jsonl": _read_compressed_lines if compression else _read_lines,
        "parquet": _read_parquet,
    }
    try:
        if kind == "jsonl" and (problem := _no_json_lines(piece)):
            if piece.start == 0:
                yield BadRecord(piece.file.name, problem)
            return
        yield from readers[kind](piece, text_key, on_bytes, longest)
    except OSError as error:
        yield BadRecord(piece.file.name, f"cannot be read: {error.strerror or error}")


def _read_text(
    piece: Piece, text_key: str, on_bytes: OnBytes, longest: int
) -> Iterator[Document | BadRecord]:
    name, path, compression = piece.file.name, Path(piece.file.path), _compression_of(piece)
    if compression:
        try:
            raw = _join(compressed.read_chunks(path, compression, on_bytes, longest), longest)
        except compressed.DamagedStreamError as error:
            yield BadRecord(name, f"{error}, so its text is not whole")
            return
    else:
        with path.open("rb") as file:
            raw = file.read(longest + 1)
        on_bytes(len(raw))
    if len(raw) > longest:
        yield BadRecord(name, _too_long(longest))
        return
    if raw.startswith(_UTF16):
        yield BadRecord(name, _IS_UTF16)
        return
    nul = raw.find(b"\0")
    if nul >= 0:
        yield BadRecord(name, f"has a NUL byte at offset {nul}, so it is no UTF-8 text but binary")
        return
    try:
        yield Document(raw.decode("utf-8").removeprefix(_MARK))
    except UnicodeDecodeError as error:
        yield BadRecord(name, _invalid_utf8(error, "offset"))


def _read_lines(
    piece: Piece, text_key: str, on_bytes: OnBytes, longest: int
) -> Iterator[Document | BadRecord]:
    """Read the lines that begin within [start, stop), so that each line of the file belongs to one piece."""
    path = Path(piece.file.path)
    stop = piece.file.size if piece.stop is None else piece.stop
    with path.open("rb") as file:
        offset = piece.start
        if offset > 0:
            file.seek(offset - 1)
            offset += skip_line(file) - 1
        first_line_offset, lines_before, count = offset, None, 0
        while offset < stop:
            line, size = read_line(file, longest)
            if size == 0:
                break
            record = _too_long(longest) if line is None else parse_json_line(line, text_key)
            if isinstance(record, str):
                if lines_before is None:
                    lines_before = _count_lines(path, first_line_offset)
                yield BadRecord(f"{piece.file.name}:{lines_before + count + 1}", record)
            elif record is not None:
                yield record
            offset += size
            count += 1
            on_bytes(size)


def _read_compressed_lines(
    piece: Piece, text_key: str, on_bytes: OnBytes, longest: int
) -> Iterator[Document | BadRecord]:
    number = 0
    lines = compressed.read_lines(Path(piece.file.path), _compression_of(piece), on_bytes, longest)
    try:
        for number, line in enumerate(lines, start=1):
            record = _too_long(longest) if line is None else parse_json_line(line, text_key)
            if isinstance(record, str):
                yield BadRecord(f"{piece.file.name}:{number}", record)
            elif record is not None:
                yield record
    except compressed.DamagedStreamError as error:
        yield BadRecord(piece.file.name, f"{error} after {number} whole lines; what follows them is lost")


def _compression_of(piece: Piece) -> str:
    return piece.file.kind.partition(".")[2]


def _head(piece: Piece) -> bytes:
    """Return the beginning of the file, decompressed; shorter than `_HEAD` if it is damaged."""
    path, compression = Path(piece.file.path), _compression_of(piece)
    if not compression:
        with path.open("rb") as file:
            return file.read(_HEAD)
    head = b""
    with suppress(compressed.DamagedStreamError):  # the reader of its lines will report it
        for chunk in compressed.read_chunks(path, compression, lambda count: None):
            head += chunk[: _HEAD - len(head)]
            if len(head) == _HEAD:
                break
    return head


def _no_json_lines(piece: Piece) -> str | None:
    """Return why the piece's file is not JSON lines, judging by its beginning; None if it may be."""
    head = _head(piece)
    if head.startswith(_UTF16):
        return _IS_UTF16
    line, newline, _ = head.removeprefix(_MARK.encode()).lstrip().partition(b"\n")
    line = line.rstrip()
    # In files other than .json, a truncated first line counts as one bad line of JSON lines.
    plain = piece.file.name.lower().removesuffix(f".{_compression_of(piece)}")
    is_json = plain.endswith(".json")
    if line in (b"[", b"[{") or (is_json and line.startswith(b"[")):
        return "is one JSON array, not JSON lines: write an object a line, as `jq -c '.[]'` does"
    if line == b"{" or (is_json and newline and _goes_on(line)):
        return (
            "is one JSON object over several lines, not JSON lines: write an object a line, as `jq -c .` does"
        )
    return None


def _goes_on(line: bytes) -> bool:
    """Return whether a line begins a JSON object that continues on the next line."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return line.startswith(b"{") and error.pos >= len(error.doc)
    except (ValueError, RecursionError):
        pass
    return False


def _read_parquet(
    piece: Piece, text_key: str, on_bytes: OnBytes, longest: int
) -> Iterator[Document | BadRecord]:
    try:
        for row, value in parquet.read_column(piece, text_key, longest):
            problem = value if isinstance(value, parquet.BadValue) else problem_of(value)
            if problem is None and len(str(value).encode()) > longest:
                problem = _too_long(longest)
            if problem is not None:
                yield BadRecord(f"{piece.file.name}, row {row}", str(problem))
            else:
                yield Document(str(value))
    except parquet.DamagedFileError as error:
        yield BadRecord(piece.file.name, str(error))
    on_bytes(piece.size)


def _join(chunks: Iterable[bytes], longest: int) -> bytes:
    """Return the joined chunks, or a beginning of more than `longest` bytes."""
    whole = bytearray()
    for chunk in chunks:
        whole += chunk
        if len(whole) > longest:
            break
    return bytes(whole)


def _too_long(longest: int) -> str:
    return f"is longer than max_document_bytes={longest}: cut it into documents, or raise that option"


def parse_json_line(line: bytes, text_key: str) -> Document | str | None:
    """Parse one line; return its document, the reason why it is invalid, or None for a blank line."""
    value = parse_json_object(line)
    if not isinstance(value, dict):
        return value
    if text_key not in value:
        keys = ", ".join(repr(key) for key in list(value)[:_SHOWN_KEYS])
        return f"has no key {text_key!r}; its keys are {keys or 'none'} (option text_key chooses)"
    text = value[text_key]
    problem = problem_of(text)
    return problem if problem is not None else Document(text)


def parse_json_object(line: bytes) -> dict[str, Any] | str | None:
    """Parse one line; return its object, the reason why it is invalid, or None for a blank line.

    A byte order mark is dropped, also in later lines, since files may have been joined.
    """
    try:
        text = line.decode("utf-8").removeprefix(_MARK)
        if not text.strip(_BLANK):
            return None
        value = json.loads(text)
    except UnicodeDecodeError as error:
        return _invalid_utf8(error, "byte of the line")
    except json.JSONDecodeError as error:
        return f"is not JSON: {error.msg} at column {error.colno}"
    except RecursionError:
        return "is JSON nested too deeply to be read"
    except ValueError as error:  # e.g. integers beyond Python's limit of digits
        return f"is not JSON that can be read: {str(error).partition(';')[0]}"
    return value if isinstance(value, dict) else f"is a JSON {type(value).__name__}, not an object"


def problem_of(text: object) -> str | None:
    """Return why a value is not a valid document text, or None."""
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
    """Return the number of newlines in the first `stop` bytes."""
    count = 0
    with path.open("rb") as file:
        while stop > 0 and (chunk := file.read(min(stop, 2**20))):
            count += chunk.count(b"\n")
            stop -= len(chunk)
    return count
