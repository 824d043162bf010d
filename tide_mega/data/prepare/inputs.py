"""Finds the input files, in an order that depends on their names alone, and cuts them into units of work.

The units are the same whatever the number of workers.
"""

import errno
import os
import stat
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet

from tide_mega.data.prepare.compressed import COMPRESSIONS
from tide_mega.errors import ConfigError, printable

Kind = str
"""`parquet`; or `text` (a document per file) or `jsonl` (one per line), plus compression: `jsonl.zst`."""
STDLIB = "stdlib"
HIDDEN, AGAIN = "(hidden)", "(linked again)"
"""Counter names for hidden files with a supported suffix, and for folders reached a second time through a link."""
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

_UNITS = 64


def kinds_by_suffix(further: Iterable[str] = ()) -> dict[str, Kind]:
    """Return the kind of each supported suffix, including compressed ones; `further` suffixes are plain text."""
    formats = _FORMATS | {suffix.lower(): "text" for suffix in further}
    compressed = {
        f"{suffix}.{compression}": f"{kind}.{compression}"
        for suffix, kind in formats.items()
        if kind != "parquet"  # which is compressed internally
        for compression in COMPRESSIONS
    }
    return compressed | formats


def suffix_of(name: str, kinds: Mapping[str, Kind]) -> str | None:
    """Return the longest supported suffix that the name ends with, ignoring case."""
    lower = name.lower()
    return max((suffix for suffix in kinds if lower.endswith(suffix)), key=len, default=None)


@dataclass(frozen=True)
class InputFile:
    """One input file."""

    path: str
    """Where it is read from."""
    name: str
    """Its name in messages and in the index: relative to the input under which it was found."""
    kind: Kind
    size: int
    """Bytes."""
    modified: int
    """Time of last modification in ns."""
    lenient: bool = False
    """Skip the file if it is bad, whatever `on_bad_file` says."""
    problem: str = ""
    """Why it cannot be read, if known before opening: a broken link, a named pipe."""


@dataclass(frozen=True)
class Inputs:
    """All files found under the inputs."""

    files: list[InputFile]
    """Files with content, in order."""
    empty: list[str]
    """Names of empty files."""
    ignored: dict[str, int]
    """Files in folders with unsupported suffixes, counted by suffix; and the counts of HIDDEN and AGAIN."""
    links: list[str] = field(default_factory=list)
    """Links in folders that were followed, to input files and to folders, as `name -> target`."""


def find_inputs(inputs: list[str], suffixes: list[str], leave_out: Path | None = None) -> Inputs:
    """List the files of `inputs` in the order given, folders recursively in sorted order.

    Nothing in a folder goes uncounted: unreadable files are listed with their problem, others counted in
    `ignored`. `stdlib` means the library source of the running Python: every .py file except installed packages.
    A few of its test files are deliberately not UTF-8; they are skipped and named in the index.

    Args:
        inputs: files, folders or `stdlib`.
        suffixes: further suffixes, of plain text.
        leave_out: a folder within one of them that is not input: the output folder.

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
    # A parquet file of zero bytes is damaged, not one without rows.
    empty = [file.name for file in found if _is_empty(file)]
    return Inputs(
        [file for file in found if not _is_empty(file)], empty, dict(sorted(ignored.items())), sorted(links)
    )


def describe_links(links: list[str]) -> str:
    """Return which links of the inputs were followed, in words."""
    more = f" and {len(links) - _SHOWN_LINKS:,} more" if len(links) > _SHOWN_LINKS else ""
    return f"links followed: {', '.join(links[:_SHOWN_LINKS])}{more}"


def describe_ignored(ignored: Mapping[str, int]) -> str:
    """Return the counts of `Inputs.ignored` in words."""
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
    """Yield the files to read, including unreadable ones; counts the others in `ignored`, adds to `links`."""
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
    """The content of a folder, recursively."""

    paths: list[Path]
    """All entries that are not folders, and folders that cannot be listed, sorted by path components."""
    again: int
    """Folders left out because a link led to them a second time."""
    linked: list[Path]
    """Links to folders that were followed."""


def _walk(root: Path, leave_out: Callable[[Path], bool]) -> _Walk:
    """Walk a folder, following links to folders, each folder once, except those that `leave_out` selects."""
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
        # Sorted, so that it is well-defined which of two links to one folder is followed.
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


_SMALLEST_UNIT = 4 * 2**20
_LARGEST_UNIT = 512 * 2**20


@dataclass(frozen=True)
class Piece:
    """A file, or the part of it that one unit reads."""

    file: InputFile
    start: int
    """First byte (jsonl: lines that begin at or after it) or first row group (parquet); else 0."""
    stop: int | None
    """Exclusive end in the same unit; None means the end of the file."""
    size: int
    """Bytes, for balancing units and for the progress bar."""

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole file."""
        return self.start == 0 and self.stop in (None, self.file.size)


@dataclass(frozen=True)
class Unit:
    """The input that one process tokenises at a time, into shards of its own."""

    number: int
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Input bytes."""
        return sum(piece.size for piece in self.pieces)

    def describe(self) -> list[dict[str, Any]]:
        """Return what identifies the unit's content: names, sizes, times and ranges, but no folders."""
        described = [asdict(piece) for piece in self.pieces]
        for piece in described:
            del piece["file"]["path"]
            if not piece["file"]["problem"]:
                del piece["file"]["problem"]
        return described


def plan_units(files: list[InputFile], unit_bytes: int) -> list[Unit]:
    """Group small files and cut large ones into units of about `unit_bytes` bytes, in order.

    `unit_bytes` 0 means 1/64 of the input, bounded to 4 MiB to 512 MiB.
    """
    if unit_bytes == 0:
        total = sum(file.size for file in files)
        unit_bytes = min(max(total // _UNITS, _SMALLEST_UNIT), _LARGEST_UNIT)
    units: list[Unit] = []
    pending: list[Piece] = []
    size = 0
    for file in files:
        for piece in _cut(file, unit_bytes):
            pending.append(piece)
            size += piece.size
            if size >= unit_bytes:
                units.append(Unit(len(units), tuple(pending)))
                pending, size = [], 0
    if pending:
        units.append(Unit(len(units), tuple(pending)))
    return units


def _cut(file: InputFile, unit_bytes: int) -> list[Piece]:
    if file.problem:
        return [Piece(file, 0, None, file.size)]
    if file.kind == "jsonl":
        starts = range(0, file.size, unit_bytes)
        stops = [min(start + unit_bytes, file.size) for start in starts]
        return [Piece(file, start, stop, stop - start) for start, stop in zip(starts, stops, strict=True)]
    if file.kind == "parquet":
        return _cut_parquet(file, unit_bytes)
    return [Piece(file, 0, None, file.size)]


def _cut_parquet(file: InputFile, unit_bytes: int) -> list[Piece]:
    try:
        # Opened here, since pyarrow takes only UTF-8 paths and treats some as URIs.
        with Path(file.path).open("rb") as opened:
            metadata = pyarrow.parquet.read_metadata(opened)
    except (pyarrow.ArrowException, OSError):
        return [Piece(file, 0, None, file.size)]  # its reader will meet the same error and report it
    if metadata.num_rows == 0:
        return [Piece(file, 0, None, file.size)]
    pieces: list[Piece] = []
    start = size = 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= unit_bytes or group == metadata.num_row_groups - 1:
            pieces.append(Piece(file, start, group + 1, size))
            start, size = group + 1, 0
    return pieces
