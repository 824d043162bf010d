"""Finding the input files, in an order that depends on their names alone."""

import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tide_mega.config.errors import ConfigError

Kind = Literal["text", "jsonl", "jsonl.zst", "parquet"]
STDLIB = "stdlib"
_KINDS: dict[str, Kind] = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".jsonl.zst": "jsonl.zst",
    ".parquet": "parquet",
}
_INSTALLED = {"site-packages", "dist-packages"}


@dataclass(frozen=True)
class InputFile:
    """One file of text."""

    path: str
    """Where it is read."""
    name: str
    """How it is named in messages and in the index: relative to the input it was found under."""
    kind: Kind
    size: int
    """Bytes."""
    modified: int
    """Time of last modification, ns."""
    lenient: bool = False
    """Skip the file when it is bad, whatever `on_bad_file` says."""


@dataclass(frozen=True)
class Inputs:
    """What the inputs came to."""

    files: list[InputFile]
    """Files with content, in order."""
    empty: list[str]
    """Names of files without a byte."""
    ignored: dict[str, int]
    """Files in folders whose suffix is not one that is read: suffix -> count."""


def find_inputs(inputs: list[str], suffixes: list[str]) -> Inputs:
    """Lists the files of `inputs`: these in the order given, folders recursively in sorted order.

    `stdlib` stands for the running Python's library source: every .py file but installed packages. A few
    of its test files are deliberately not UTF-8; they are skipped and named in the index.

    Raises:
        ConfigError: an input does not exist, has an unknown suffix, or names a file a second time.
    """
    kinds = _KINDS | {suffix.lower(): "text" for suffix in suffixes}
    found: list[InputFile] = []
    ignored: Counter[str] = Counter()
    for entry in inputs:
        if entry == STDLIB:
            found.extend(_stdlib_files())
            continue
        root = Path(entry)
        if root.is_dir():
            for path in _walk(root):
                kind = _kind_of(path, kinds)
                if kind is None:
                    ignored[path.suffix or "(none)"] += 1
                else:
                    found.append(_describe(path, f"{root.resolve().name}/{path.relative_to(root)}", kind))
        elif root.is_file():
            kind = _kind_of(root, kinds)
            if kind is None:
                raise ConfigError(
                    f"inputs has {entry}, whose suffix is not one of {', '.join(kinds)}; "
                    f"pass suffixes=[{root.suffix or '.txt'}] to read it as plain text"
                )
            found.append(_describe(root, root.name, kind))
        else:
            raise ConfigError(f"inputs has {entry}, which is neither a file nor a folder (nor stdlib)")
    _refuse_repeats(found)
    if not found:
        raise ConfigError(f"inputs={inputs} has no file with a suffix of {', '.join(kinds)}; see suffixes")
    # A parquet file of no bytes is a damaged one, not one without rows.
    empty = [file.name for file in found if file.size == 0 and file.kind != "parquet"]
    files = [file for file in found if file.size > 0 or file.kind == "parquet"]
    return Inputs(files, empty, dict(sorted(ignored.items())))


def _kind_of(path: Path, kinds: dict[str, Kind]) -> Kind | None:
    name = path.name.lower()
    matching = [suffix for suffix in kinds if name.endswith(suffix)]
    return kinds[max(matching, key=len)] if matching else None


def _describe(path: Path, name: str, kind: Kind, lenient: bool = False) -> InputFile:
    status = path.stat()
    return InputFile(str(path), name, kind, status.st_size, status.st_mtime_ns, lenient)


def _stdlib_files() -> Iterator[InputFile]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _walk(root, leave_out=_INSTALLED):
        if path.suffix == ".py":
            yield _describe(path, f"{STDLIB}/{path.relative_to(root)}", "text", lenient=True)


def _walk(root: Path, leave_out: set[str] | frozenset[str] = frozenset()) -> list[Path]:
    """Files under `root` sorted by their parts; linked folders are followed, each folder once."""
    visited: set[str] = set()
    files: list[Path] = []
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_raise):
        real = os.path.realpath(folder)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        # Sorted, so that which of two links to one folder is followed is no accident.
        subfolders[:] = sorted(name for name in subfolders if name not in leave_out)
        files.extend(Path(folder, name) for name in names if Path(folder, name).is_file())
    return sorted(files, key=lambda path: path.relative_to(root).parts)


def _raise(error: OSError) -> None:
    raise ConfigError(f"inputs has a folder that cannot be read: {error}")


def _refuse_repeats(files: list[InputFile]) -> None:
    seen: dict[str, str] = {}
    for file in files:
        real = os.path.realpath(file.path)
        if real in seen:
            raise ConfigError(f"inputs names {file.path} a second time (as {seen[real]}); name it once")
        seen[real] = file.path
