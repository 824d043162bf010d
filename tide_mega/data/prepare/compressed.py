"""Bytes and lines of a file, compressed or not, in bounded memory; detects truncated and altered streams.

A file may contain several streams one after the other, as `cat` or a parallel compressor leaves them; all are
read. However much a few bytes decompress to, only a bounded part is in memory at a time.
"""

import bz2
import lzma
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

MAX_DOCUMENT_BYTES = 2**27
"""Default limit of a line and of a document, in bytes."""
_SKIPPED_AT_A_TIME = 2**20


def read_line(file: BinaryIO, longest: int) -> tuple[bytes | None, int]:
    """Read a line including its newline.

    Returns:
        The line (b"" at the end of the file), or None if it has more than `longest` bytes before its newline;
        and its size in the file.
    """
    line = file.readline(longest + 1)
    if len(line) <= longest or line.endswith(b"\n"):
        return line, len(line)
    return None, len(line) + skip_line(file)


def skip_line(file: BinaryIO) -> int:
    """Read past the next newline; return the number of bytes read."""
    count = 0
    while piece := file.readline(_SKIPPED_AT_A_TIME):
        count += len(piece)
        if piece.endswith(b"\n"):
            break
    return count


def cut_lines(chunks: Iterable[bytes], longest: int) -> Iterator[bytes | None]:
    """Yield each line of the joined chunks without its newline; None for one of more than `longest` bytes.

    A last line without a newline is yielded at the end of the chunks.
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


_SMALLEST_WINDOW, _LARGEST_WINDOW = 2**27, 2**31
"""Window sizes in bytes: one always allowed (the zstd tool's own limit), and zstd's maximum."""
_BESIDES_WINDOW = 2**20
"""Bytes that the xz decoder needs in addition to the window."""
_GZIP_HEADER = 16 + zlib.MAX_WBITS
_CHUNK = 2**16
"""Compressed bytes read at a time."""
_PART = 2**20
"""Bytes decompressed at a time, except by zstd."""
_ZSTD_SLICE = 2**8
"""Compressed bytes of zstd decompressed at a time: its output cannot be limited, but a block takes at least 4
bytes and gives at most 128 KiB, so these give at most 8 MiB. If they are damaged, none of their output is
available."""


class DamagedStreamError(Exception):
    """The stream is truncated or cannot be decompressed; the message says which."""


Feed = Callable[[Any, bytes], Generator[bytes, None, bytes]]
"""Decompresses the next bytes with the decompressor of one stream; returns the bytes after the stream's end."""


@dataclass(frozen=True)
class _Codec:
    name: str
    new: Callable[[int], Any]
    """Returns a decompressor of one stream, given the largest window in bytes that it may use."""
    feed: Feed
    padded: bool = False
    """Whether a stream may be followed by zero padding."""


def _feed_zlib(stream: Any, raw: bytes) -> Generator[bytes, None, bytes]:
    while True:
        part = stream.decompress(raw, _PART)
        yield part
        raw = stream.unconsumed_tail
        if stream.eof or (not raw and len(part) < _PART):
            return bytes(stream.unused_data)


def _feed_with_limit(
    stream: bz2.BZ2Decompressor | lzma.LZMADecompressor, raw: bytes
) -> Generator[bytes, None, bytes]:
    yield stream.decompress(raw, _PART)
    while not stream.eof and not stream.needs_input:
        yield stream.decompress(b"", _PART)
    return stream.unused_data if stream.eof else b""


def _feed_zstd(stream: Any, raw: bytes) -> Generator[bytes, None, bytes]:
    for start in range(0, len(raw), _ZSTD_SLICE):
        yield stream.decompress(raw[start : start + _ZSTD_SLICE])
        if stream.eof:
            return bytes(stream.unused_data) + raw[start + _ZSTD_SLICE :]
    return b""


_CODECS = {
    "gz": _Codec("gzip", lambda window: zlib.decompressobj(_GZIP_HEADER), _feed_zlib, padded=True),
    "zst": _Codec(
        "zstd", lambda window: zstandard.ZstdDecompressor(max_window_size=window).decompressobj(), _feed_zstd
    ),
    "xz": _Codec(
        "xz",
        lambda window: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=window + _BESIDES_WINDOW),
        _feed_with_limit,
        padded=True,
    ),
    "bz2": _Codec("bzip2", lambda window: bz2.BZ2Decompressor(), _feed_with_limit),
}
COMPRESSIONS = tuple(_CODECS)
"""Suffixes of compressed files, without the dot."""
_ERRORS = (zlib.error, zstandard.ZstdError, lzma.LZMAError, OSError)  # bz2 raises OSError


def read_chunks(
    path: Path, compression: str, on_bytes: Callable[[int], None], longest: int = MAX_DOCUMENT_BYTES
) -> Iterator[bytes]:
    """Yield the decompressed content of the file in parts of at most 1 MiB (zstd: 8 MiB).

    Args:
        path: the file.
        compression: one of `COMPRESSIONS`.
        on_bytes: called with the number of compressed bytes read.
        longest: bytes that a stream may request as its window; 128 MiB are always allowed.

    Raises:
        DamagedStreamError: after everything before the damage has been yielded.
    """
    codec = _CODECS[compression]
    window = min(max(longest, _SMALLEST_WINDOW), _LARGEST_WINDOW)
    stream, inside, streams = codec.new(window), False, 0
    with path.open("rb") as file:
        while raw := file.read(_CHUNK):
            on_bytes(len(raw))
            while raw:
                if codec.padded and streams > 0 and not inside and not (raw := raw.lstrip(b"\0")):
                    break
                inside = True
                try:
                    raw = yield from codec.feed(stream, raw)
                except _ERRORS as error:
                    raise DamagedStreamError(_describe(error, codec.name, window)) from error
                if stream.eof:
                    inside, streams = False, streams + 1
                    stream = codec.new(window)
    if inside:
        raise DamagedStreamError(f"its {codec.name} stream is cut off")


def _describe(error: Exception, codec: str, window: int) -> str:
    # Both libraries tell this only by message: "Frame requires too much memory", "Memory usage limit exceeded".
    if isinstance(error, zstandard.ZstdError | lzma.LZMAError) and "memory" in str(error).lower():
        return (
            f"its {codec} stream asks for more than {window} bytes of memory as its window (raise "
            "max_document_bytes, or compress it anew with a smaller one)"
        )
    return f"its {codec} stream is damaged ({error})"


def read_lines(
    path: Path, compression: str, on_bytes: Callable[[int], None], longest: int = MAX_DOCUMENT_BYTES
) -> Iterator[bytes | None]:
    """Yield each line without its newline, None for one above `longest` bytes; arguments as in `read_chunks`.

    A line cut off by damage is not yielded.

    Raises:
        DamagedStreamError: after the last whole line before the damage.
    """
    return cut_lines(read_chunks(path, compression, on_bytes, longest), longest)
