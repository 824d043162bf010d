"""Files that are either whole or absent, whenever the process is killed."""

import errno
import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

log = logging.getLogger(__name__)
_TEMPORARY = re.compile(r"\.(.+)\.tmp-\d+", re.DOTALL)
_NOT_FOR_FOLDERS = {
    errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS,  # fsync
    errno.EISDIR, errno.EACCES, errno.EPERM,  # opening
}  # fmt: skip


@contextmanager
def atomic_writer(path: Path, *, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path`; on success it is flushed to disk and renamed to `path`.

    A link stays a link: the file that it points to is replaced. What has the temporary file's name already is
    never opened. `mode` has the permissions, less the umask's.
    """
    path = path.resolve() if path.is_symlink() else path
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb", opener=functools.partial(os.open, mode=mode)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    to_disk(path.parent)


def write_bytes(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Writes `content` to `path` atomically, with the permissions `mode`, less the umask's."""
    with atomic_writer(path, mode=mode) as file:
        file.write(content)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON with sorted keys to `path` atomically."""
    write_bytes(path, (json.dumps(value, sort_keys=True, ensure_ascii=False) + "\n").encode())


def unfinished(name: str) -> str | None:
    """The name of the file that a killed `atomic_writer` meant, if `name` is what it left behind."""
    found = _TEMPORARY.fullmatch(name)
    return None if found is None else found[1]


def fingerprint_of(value: Any) -> str:
    """SHA-256, in hexadecimal, of the canonical JSON of `value`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """SHA-256, in hexadecimal, of the content of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_disk(path: Path) -> None:
    """Ask the operating system to write a file, or a folder's list of files, before going on.

    A file system that can do this for files alone (some of FUSE, some shared ones) is tolerated, and said once
    in each process.

    Raises:
        OSError: it failed, but not because folders are not supported.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NOT_FOR_FOLDERS or not path.is_dir():
            raise
        _say_refused(path.stat().st_dev, path, error)


_refused: set[int] = set()


def _say_refused(device: int, path: Path, error: OSError) -> None:
    if device not in _refused:
        _refused.add(device)
        log.warning(
            "the file system of %s does not write a folder to disk on demand (%s): going on; should the machine "
            "lose power, files of the last moments may be missing",
            path,
            error.strerror,
        )
