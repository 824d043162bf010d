"""Lines of a file, none of which is held in memory beyond a limit."""

from collections.abc import Iterable, Iterator
from typing import BinaryIO

MAX_DOCUMENT_BYTES = 2**27
"""The longest line, and document, unless an option says otherwise."""
_SKIPPED_AT_A_TIME = 2**20


def read_line(file: BinaryIO, longest: int) -> tuple[bytes | None, int]:
    """Reads a line with its newline.

    Returns:
        The line (b"" at the end of the file), or None for one of more than `longest` bytes before its newline; and
        the bytes that it takes in the file.
    """
    line = file.readline(longest + 1)
    if len(line) <= longest or line.endswith(b"\n"):
        return line, len(line)
    return None, len(line) + skip_line(file)


def skip_line(file: BinaryIO) -> int:
    """Reads on to behind the next newline; returns the number of bytes."""
    count = 0
    while piece := file.readline(_SKIPPED_AT_A_TIME):
        count += len(piece)
        if piece.endswith(b"\n"):
            break
    return count


def cut_lines(chunks: Iterable[bytes], longest: int) -> Iterator[bytes | None]:
    """Yields each line of what the chunks join to, without its newline; None for one of more than `longest` bytes.

    A last line without a newline is yielded when the chunks end.
    """
    begun: list[bytes] = []
    size = 0

    def add(chunk: bytes, start: int, end: int) -> None:
        nonlocal size
        size += end - start
        if size > longest:
            begun.clear()
        else:
            begun.append(chunk[start:end])

    for chunk in chunks:
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            add(chunk, start, end)
            yield b"".join(begun) if size <= longest else None
            begun.clear()
            size, start = 0, end + 1
        add(chunk, start, len(chunk))
    if size:
        yield b"".join(begun) if size <= longest else None
