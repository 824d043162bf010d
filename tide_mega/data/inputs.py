"""Finding the input files, in an order that depends on their names alone."""

import errno
import os
import stat
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tide_mega.config.errors import ConfigError, printable
from tide_mega.data.compressed import COMPRESSIONS

Kind = str
"""`parquet`; or `text` (a document a file) or `jsonl` (one a line), with the compression behind: `jsonl.zst`."""
STDLIB = "stdlib"
HIDDEN, AGAIN = "(hidden)", "(linked again)"
"""What hidden files with a suffix that is read are counted under, and folders that a link leads to once more."""
_FORMATS: dict[str, Kind] = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
_SHOWN_LINKS = 10
_INSTALLED = {"site-packages", "dist-packages"}
_SPECIAL = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def kinds_by_suffix(further: Iterable[str] = ()) -> dict[str, Kind]:
    """Suffixes of the files that are read, compressed ones too; `further` ones are plain text."""
    formats = _FORMATS | {suffix.lower(): "text" for suffix in further}
    compressed = {
        f"{suffix}.{compression}": f"{kind}.{compression}"
        for suffix, kind in formats.items()
        if kind != "parquet"  # which is compressed inside
        for compression in COMPRESSIONS
    }
    return compressed | formats


def suffix_of(name: str, kinds: Mapping[str, Kind]) -> str | None:
    """The longest of the suffixes that the name ends with, upper case or lower."""
    lower = name.lower()
    return max((suffix for suffix in kinds if lower.endswith(suffix)), key=len, default=None)


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
    problem: str = ""
    """Why it cannot be read, if that shows before it is opened: a broken link, a named pipe."""


@dataclass(frozen=True)
class Inputs:
    """What the inputs came to."""

    files: list[InputFile]
    """Files with content, in order."""
    empty: list[str]
    """Names of files without a byte."""
    ignored: dict[str, int]
    """Files in folders whose suffix is not one that is read: suffix -> count; and counts of HIDDEN and AGAIN."""
    links: list[str] = field(default_factory=list)
    """Links that were followed in folders, to files that are read and to folders, as `name -> target`."""


def find_inputs(inputs: list[str], suffixes: list[str], leave_out: Path | None = None) -> Inputs:
    """Lists the files of `inputs`: these in the order given, folders recursively in sorted order.

    Nothing in a folder goes uncounted: what cannot be read is listed with its problem, the rest in `ignored`.
    `stdlib` stands for the running Python's library source: every .py file but installed packages. A few
    of its test files are deliberately not UTF-8; they are skipped and named in the index.

    Args:
        inputs: files, folders or `stdlib`.
        suffixes: further suffixes, of plain text.
        leave_out: a folder in one of them that is no input: the one to be written.

    Raises:
        ConfigError: an input does not exist, has an unknown suffix, or names a file a second time.
    """
    _check_further(suffixes)
    kinds = kinds_by_suffix(suffixes)
    found: list[InputFile] = []
    ignored: Counter[str] = Counter()
    links: list[str] = []
    real = None if leave_out is None else os.path.realpath(leave_out)

    def is_left_out(folder: Path) -> bool:
        return os.path.realpath(folder) == real

    for entry in inputs:
        if entry == STDLIB:
            found.extend(_stdlib_files())
            continue
        root = Path(entry)
        mode = _mode_of(root)
        if stat.S_ISDIR(mode):
            found += _sort_out(_walk(root, is_left_out), root, kinds, ignored, links)
        elif stat.S_ISREG(mode):
            suffix = suffix_of(root.name, kinds)
            if suffix is None:
                raise ConfigError(
                    f"inputs has {printable(entry)}, whose suffix is not one that is read "
                    f"({_readable(suffixes)}): convert it, or, if it is plain text as it stands, "
                    f"{_to_read_as_text(root)}"
                )
            found.append(_describe(root, root.name, kinds[suffix]))
        else:
            raise ConfigError(
                f"inputs has {printable(entry)}, which is {_special(mode)}: write its content to a file"
            )
    _refuse_repeats(found)
    if not found:
        raise ConfigError(
            f"inputs={inputs} has no file with a suffix that is read ({_readable(suffixes)}), but "
            f"{describe_ignored(ignored)}; suffixes adds further ones of plain text"
        )
    # A parquet file of no bytes is a damaged one, not one without rows.
    empty = [file.name for file in found if _is_empty(file)]
    return Inputs(
        [file for file in found if not _is_empty(file)], empty, dict(sorted(ignored.items())), sorted(links)
    )


def describe_links(links: list[str]) -> str:
    """Which links of the inputs were followed, in words."""
    more = f" and {len(links) - _SHOWN_LINKS:,} more" if len(links) > _SHOWN_LINKS else ""
    return f"links followed: {', '.join(links[:_SHOWN_LINKS])}{more}"


def describe_ignored(ignored: Mapping[str, int]) -> str:
    """Counts of `Inputs.ignored` in words."""
    special = {HIDDEN: "hidden files", AGAIN: "folders linked a second time"}
    others = ", ".join(f"{count:,} {suffix}" for suffix, count in ignored.items() if suffix not in special)
    return ", ".join(
        [
            f"{others or 'no'} files of other kinds",
            *(f"{ignored[key]:,} {name}" for key, name in special.items() if key in ignored),
        ]
    )


def _check_further(suffixes: list[str]) -> None:
    for suffix in suffixes:
        inner, _, last = suffix.rpartition(".")
        if last.lower() in COMPRESSIONS:
            raise ConfigError(
                f"suffixes has {suffix}, a compression: name what stands before it, as in "
                f"suffixes=[{inner or '.md'}], which reads {inner or '.md'}.{last} too"
            )


def _readable(further: list[str]) -> str:
    plain = sorted({*_FORMATS, *(suffix.lower() for suffix in further)} - {".parquet"})
    return f"{', '.join(plain)}, each as it is or .{', .'.join(COMPRESSIONS)}, and .parquet"


def _to_read_as_text(path: Path) -> str:
    compressed = path.suffix.removeprefix(".").lower() in COMPRESSIONS
    inner = Path(path.stem) if compressed else path
    if inner.suffix:
        return f"pass suffixes=[{inner.suffix}]"
    return f"rename it to {inner.name}.txt{path.suffix if compressed else ''}"


def _is_empty(file: InputFile) -> bool:
    return file.size == 0 and file.kind != "parquet" and not file.problem


def _mode_of(path: Path) -> int:
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        what = (
            "a link to what does not exist"
            if path.is_symlink()
            else "neither a file nor a folder (nor stdlib)"
        )
        raise ConfigError(f"inputs has {printable(str(path))}, which is {what}") from None
    except OSError as error:
        raise ConfigError(
            f"inputs has {printable(str(path))}, which cannot be read: {error.strerror}"
        ) from error


def _special(mode: int) -> str:
    return _SPECIAL.get(stat.S_IFMT(mode), "not a file")


def _sort_out(
    walk: "_Walk", root: Path, kinds: Mapping[str, Kind], ignored: Counter[str], links: list[str]
) -> Iterator[InputFile]:
    """Yields the files to be read, with those that cannot be; counts the others in `ignored`, adds to `links`."""
    top = root.resolve().name
    if walk.again:
        ignored[AGAIN] += walk.again
    for folder in walk.linked:
        inner = folder.relative_to(root)
        if not any(part.startswith(".") for part in inner.parts):
            links.append(_link(folder, f"{top}/{inner}"))
    for path in walk.paths:
        inner = path.relative_to(root)
        suffix = suffix_of(path.name, kinds)
        other = printable(path.suffix) or "(none)"
        if any(part.startswith(".") for part in inner.parts):
            ignored[HIDDEN if suffix is not None else other] += 1
            continue
        file = _describe(path, f"{top}/{inner}", kinds[suffix] if suffix is not None else "text")
        if suffix is None and not file.problem:
            ignored[other] += 1
            continue
        if not file.problem and path.is_symlink():
            links.append(_link(path, file.name))
        yield file


def _link(path: Path, name: str) -> str:
    return f"{printable(name)} -> {printable(str(path.readlink()))}"


def _describe(path: Path, name: str, kind: Kind, lenient: bool = False) -> InputFile:
    problem, modified, size = "", 0, 0
    try:
        modified = path.lstat().st_mtime_ns
        status = path.stat()
        if stat.S_ISREG(status.st_mode):
            modified, size = status.st_mtime_ns, status.st_size
        elif stat.S_ISDIR(status.st_mode):
            problem = "is a folder that cannot be listed"
        else:
            problem = f"is {_special(status.st_mode)}, not a file"
    except FileNotFoundError:
        problem = "is a link to what does not exist" if path.is_symlink() else "is gone"
    except OSError as error:
        problem = (
            "is a link in a loop of links"
            if error.errno == errno.ELOOP
            else f"cannot be read: {error.strerror}"
        )
    return InputFile(str(path), printable(name), kind, size, modified, lenient, problem)


def _stdlib_files() -> Iterator[InputFile]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _walk(root, lambda folder: folder.name in _INSTALLED).paths:
        if path.suffix == ".py":
            yield _describe(path, f"{STDLIB}/{path.relative_to(root)}", "text", lenient=True)


@dataclass(frozen=True)
class _Walk:
    """What lies under a folder."""

    paths: list[Path]
    """All but folders, and the folders that cannot be listed, sorted by their parts."""
    again: int
    """Folders left out because a link led to them a second time."""
    linked: list[Path]
    """Links to folders that were followed."""


def _walk(root: Path, leave_out: Callable[[Path], bool]) -> _Walk:
    """Follows linked folders, each folder once, but none that `leave_out` picks."""
    visited: set[str] = set()
    paths: list[Path] = []
    linked: list[Path] = []
    again = 0

    def keep(error: OSError) -> None:
        path = Path(error.filename)
        if path == root:
            raise ConfigError(
                f"inputs has the folder {printable(str(root))}, which cannot be read: {error.strerror}"
            ) from error
        paths.append(path)

    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=keep):
        real = os.path.realpath(folder)
        if real in visited:
            again += 1
            subfolders.clear()
            continue
        visited.add(real)
        if folder != str(root) and Path(folder).is_symlink():
            linked.append(Path(folder))
        # Sorted, so that which of two links to one folder is followed is no accident.
        subfolders[:] = sorted(name for name in subfolders if not leave_out(Path(folder, name)))
        paths.extend(Path(folder, name) for name in names)
    return _Walk(sorted(paths, key=lambda path: path.relative_to(root).parts), again, linked)


def _refuse_repeats(files: list[InputFile]) -> None:
    seen: dict[str, str] = {}
    for file in files:
        if file.problem:
            continue
        real = os.path.realpath(file.path)
        if real in seen:
            raise ConfigError(
                f"inputs names {printable(file.path)} a second time (as {printable(seen[real])}); name it once"
            )
        seen[real] = file.path
