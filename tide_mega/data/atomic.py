"""Files that are either whole or absent, whenever the process is killed."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

_TEMPORARY = ".tmp-"


@contextmanager
def atomic_writer(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path`; on success it is flushed to disk and renamed to `path`."""
    temporary = path.with_name(f".{path.name}{_TEMPORARY}{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    to_disk(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes `content` to `path` atomically."""
    with atomic_writer(path) as file:
        file.write(content)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON with sorted keys to `path` atomically."""
    write_bytes(path, (json.dumps(value, sort_keys=True, ensure_ascii=False) + "\n").encode())


def is_temporary(path: Path) -> bool:
    """Whether `path` is what a killed `atomic_writer` left behind."""
    return path.name.startswith(".") and _TEMPORARY in path.name


def fingerprint_of(value: Any) -> str:
    """SHA-256, in hexadecimal, of the canonical JSON of `value`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """SHA-256, in hexadecimal, of the content of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_disk(path: Path) -> None:
    """Ask the operating system to write a file, or a folder's list of files, before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
