"""Bytes and lines of a compressed file, with a cut-off or altered stream noticed.

A file may hold several streams one after the other, as `cat` or a parallel compressor leaves them; all are read.
However much a few bytes decompress to, only a bounded part of it is in memory at a time.
"""

import bz2
import lzma
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from tide_mega.data.lines import MAX_DOCUMENT_BYTES, cut_lines

_SMALLEST_WINDOW, _LARGEST_WINDOW = 2**27, 2**31
"""Bytes: what a stream may ask for in any case (the zstd tool's own limit), and the most that zstd knows."""
_BESIDES_WINDOW = 2**20
"""Bytes that the decoder of xz counts besides."""
_GZIP_HEADER = 16 + zlib.MAX_WBITS
_CHUNK = 2**16
"""Compressed bytes read at a time."""
_PART = 2**20
"""Bytes decompressed at a time, except by zstd."""
_ZSTD_SLICE = 2**8
"""Compressed bytes of zstd decompressed at a time: it has no limit on what comes out, but 4 bytes, a block, give
at most 128 KiB, so that these give 8 MiB. Where they are damaged, nothing of them is had."""


class DamagedStreamError(Exception):
    """The stream ends early or cannot be decompressed; the message says which."""


Feed = Callable[[Any, bytes], Generator[bytes, None, bytes]]
"""Decompresses what is read next, by a decompressor of one stream; returns what stands behind the stream's end."""


@dataclass(frozen=True)
class _Codec:
    name: str
    new: Callable[[int], Any]
    """A decompressor of one stream, which may take a window of so many bytes."""
    feed: Feed
    padded: bool = False
    """Whether zeros may follow a stream."""


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
    """Yields what the file decompresses to, in parts of at most 1 MiB (zstd: 8 MiB).

    Args:
        path: the file.
        compression: one of `COMPRESSIONS`.
        on_bytes: gets the number of compressed bytes read.
        longest: bytes that a stream may ask for as its window; 128 MiB are allowed in any case.

    Raises:
        DamagedStreamError: after what stands before the damage.
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
    # Both libraries say so in words alone: "Frame requires too much memory", "Memory usage limit exceeded".
    if isinstance(error, zstandard.ZstdError | lzma.LZMAError) and "memory" in str(error).lower():
        return (
            f"its {codec} stream asks for more than {window} bytes of memory as its window (raise "
            "max_document_bytes, or compress it anew with a smaller one)"
        )
    return f"its {codec} stream is damaged ({error})"


def read_lines(
    path: Path, compression: str, on_bytes: Callable[[int], None], longest: int = MAX_DOCUMENT_BYTES
) -> Iterator[bytes | None]:
    """Yields each line without its newline, None for one of more than `longest` bytes; arguments of `read_chunks`.

    A line that damage breaks is not yielded.

    Raises:
        DamagedStreamError: after the last whole line before the damage.
    """
    return cut_lines(read_chunks(path, compression, on_bytes, longest), longest)
