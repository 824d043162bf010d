"""Files: written whole or not at all, named so that every file system accepts them, and read with distrust.

- Writing: a file is either complete or absent, whenever the process is killed.
- Names and paths: what a folder may be called, and whether two spellings mean the same place.
- Reading stored JSON and YAML: plain values of bounded depth, anything else is refused. Run folders, datasets and
  checkpoints are passed between users; reading one must not look anything up in the reader's environment, take
  minutes, or end in a RecursionError because of how values are nested or repeated.
"""

import errno
import functools
import hashlib
import json
import logging
import math
import os
import re
import stat
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from tide_mega.errors import is_url, refuse

log = logging.getLogger(__name__)
_TEMPORARY = re.compile(r"\.(.+)\.tmp-\d+", re.DOTALL)
_NOT_FOR_FOLDERS = {
    errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS,  # fsync
    errno.EISDIR, errno.EACCES, errno.EPERM,  # opening
}  # fmt: skip

_refused: set[int] = set()
NAME_BYTES = 255
"""Maximum bytes of a file name on the file systems of Linux and macOS."""
DEEPEST = 32
"""Maximum nesting depth; a configuration has three levels, and no file of ours has ten."""


@contextmanager
def atomic_writer(path: Path, *, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; on success it is flushed to disk and renamed to `path`.

    A link stays a link: its target is replaced. An existing entry with the temporary file's name is never opened.
    `mode` gives the permissions, reduced by the umask.
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
    """Write `content` to `path` atomically, with the permissions `mode` reduced by the umask."""
    with atomic_writer(path, mode=mode) as file:
        file.write(content)


def json_values(value: Any) -> Any:
    """Return a value with NaN and infinities, which JSON lacks, as "NaN", "Infinity", "-Infinity"."""
    if isinstance(value, dict):
        return {key: json_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON with sorted keys to `path` atomically."""
    write_bytes(path, (json.dumps(value, sort_keys=True, ensure_ascii=False) + "\n").encode())


def unfinished(name: str) -> str | None:
    """Return the target name if `name` is a temporary file left by a killed `atomic_writer`; else None."""
    found = _TEMPORARY.fullmatch(name)
    return None if found is None else found[1]


def fingerprint_of(value: Any) -> str:
    """Return the SHA-256, in hexadecimal, of the canonical JSON of `value`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Return the SHA-256, in hexadecimal, of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_disk(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk (fsync).

    A file system that supports this only for files (some of FUSE, some shared ones) is tolerated, and logged
    once per process.

    Raises:
        OSError: it failed for another reason than missing support for folders.
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


def _say_refused(device: int, path: Path, error: OSError) -> None:
    if device not in _refused:
        _refused.add(device)
        log.warning(
            "the file system of %s does not write a folder to disk on demand (%s): going on; should the machine "
            "lose power, files of the last moments may be missing",
            path,
            error.strerror,
        )


PATH_BYTES = 4096 - 256
"""Maximum bytes of a path in the kernel, less what is written below a given folder."""


def check_folder_name(key: str, name: str) -> None:
    """Check that a value can be the name of a folder.

    Raises:
        ConfigError: it is blank or too long, means another folder, or contains a separator or control character.
    """
    _check_characters(key, name, "give a name")
    if name in (".", "..") or "/" in name or "\\" in name:
        refuse(key, repr(name), "is not a folder's name", "use a name without path separators")
    _check_length(key, name)


def check_folder_path(key: str, path: str) -> None:
    """Check that a value can be the path of a folder.

    Raises:
        ConfigError: it is blank or a URL, it or one of its names is too long, or it contains a control character.
    """
    if is_url(path):
        refuse(key, path, "is a URL, and a folder is needed", "mount what it names, and give the folder")
    _check_characters(key, path, "give a folder")
    for name in path.split("/"):
        _check_length(key, name)
    if len(os.fsencode(path)) > PATH_BYTES:
        refuse(key, _shortened(path), f"is longer than {PATH_BYTES} bytes", "give a shorter path")


def _check_characters(key: str, text: str, remedy: str) -> None:
    if not text.strip():
        refuse(key, repr(text), "is blank", remedy)
    if any(unicodedata.category(character) == "Cc" for character in text):
        refuse(key, repr(text), "has a line break or another control character", "leave it out")


def _check_length(key: str, name: str) -> None:
    size = len(os.fsencode(name))
    if size > NAME_BYTES:
        why = f"has a name of {size:,} bytes, and a folder's has at most {NAME_BYTES}"
        refuse(key, _shortened(name), why, "use a shorter one")


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def plain_name(name: Any) -> str:
    """Return a file name read from disk, after checking that it stays inside its folder.

    Raises:
        ValueError: it is not a plain name, but for example a path, `..` or a number.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"{_shortened(repr(name))} is not the plain name of a file")
    return name


def regular_file(folder: Path, name: Any) -> Path:
    """Return the path of a file in `folder` whose name was read from disk.

    Raises:
        ValueError: the name is not a plain one, or its entry is a link or anything else but a regular file.
        OSError: it cannot be accessed or does not exist (FileNotFoundError).
    """
    path = folder / plain_name(name)
    if not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError(f"{name} is {'a link' if path.is_symlink() else 'not a regular file'}")
    return path


def is_same_place(one: Any, other: Any) -> bool:
    """Return whether two paths, or two lists of paths, lead to the same places: relative, absolute or by links."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(is_same_place, one, other))
    if one is None or other is None:
        return one is other
    return Path(one).resolve() == Path(other).resolve()


_LONGEST_YAML = 256 * 1024


def parse_json(text: str | bytes) -> Any:
    """Read JSON.

    Raises:
        ValueError: it is not JSON, nested more than `DEEPEST` levels deep, or an object in it says a name twice:
            of two files with one name a list would show the last alone.
    """
    try:
        value = json.loads(text, object_pairs_hook=_once_each)
    except RecursionError:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep") from None
    brackets = ("[", "{") if isinstance(text, str) else (b"[", b"{")
    # With fewer brackets than levels, as in any line of metrics.jsonl, the values need not be inspected.
    if sum(map(text.count, brackets)) > DEEPEST and _depth_exceeds(value, DEEPEST):  # type: ignore[arg-type]
        raise ValueError(f"it is nested more than {DEEPEST} levels deep")
    return value


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it says {max(names, key=names.count)!r} twice")
    return found


def read_json(folder: Path, name: str) -> Any:
    """Read a JSON file from a folder that others may have written.

    Raises:
        ValueError: it is not a regular file, or its content is not valid for `parse_json`.
        OSError: it cannot be read or does not exist (FileNotFoundError).
    """
    return parse_json(regular_file(folder, name).read_text(encoding="utf-8"))


def _depth_exceeds(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most + 1):
        level = [outer for outer in level if isinstance(outer, dict | list)]
        if not level:
            return False
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
    return True


def check_yaml(text: str) -> None:
    """Refuse YAML of excessive depth or size in memory, before anything is built from it.

    Raises:
        ValueError: it is not a YAML mapping, is longer than 256 KiB, nested more than `DEEPEST` levels deep, or
            contains an alias.
    """
    if len(text) > _LONGEST_YAML:
        raise ValueError(f"it is longer than {_LONGEST_YAML // 1024} KiB")
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            line = event.start_mark.line + 1
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"line {line} has the alias *{event.anchor}, and stored values are plain")
            if depth == 0 and isinstance(event, yaml.ScalarEvent | yaml.SequenceStartEvent):
                raise ValueError("it is not a mapping of keys to values")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ValueError(f"line {line} is nested more than {DEEPEST} levels deep")
    except yaml.YAMLError as error:
        raise ValueError(f"it is not YAML: {getattr(error, 'problem', None) or error}") from error
