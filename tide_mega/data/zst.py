"""Lines of a Zstandard-compressed file, with a cut-off or altered stream noticed."""

from collections.abc import Callable, Iterator
from pathlib import Path

import zstandard

_CHUNK = 2**20
_LARGEST_WINDOW = 2**31


class DamagedStreamError(Exception):
    """The stream ends early or cannot be decompressed; the message says which."""


def read_lines(path: Path, on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    """Yields each line without its newline, of all frames one after the other.

    A line that the damage breaks is not yielded.

    Raises:
        DamagedStreamError: after the last whole line before the damage.
    """
    rest: list[bytes] = []
    for chunk in _decompressed(path, on_bytes):
        head, newline, tail = chunk.partition(b"\n")
        if not newline:
            rest.append(head)
            continue
        yield b"".join([*rest, head])
        *lines, last = tail.split(b"\n")
        yield from lines
        rest = [last]
    if line := b"".join(rest):
        yield line


def _decompressed(path: Path, on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
    frame = decompressor.decompressobj()
    inside = False
    with path.open("rb") as file:
        while raw := file.read(_CHUNK):
            on_bytes(len(raw))
            while raw:
                inside = True
                try:
                    chunk = frame.decompress(raw)
                except zstandard.ZstdError as error:
                    raise DamagedStreamError(f"its zstd stream is damaged ({error})") from error
                if chunk:
                    yield chunk
                raw = b""
                if frame.eof:
                    raw, inside = frame.unused_data, False
                    frame = decompressor.decompressobj()
    if inside:
        raise DamagedStreamError("its zstd stream is cut off")
