"""The exact code of a start, kept in the run folder: one archive for each state the code was in.

An archive is named after the commit, and after the content too where that differs from the commit or where there
is no checkout. It holds every file, new ones too, so that it needs no repository to be read again.
"""

import functools
import gzip
import hashlib
import io
import logging
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import tide_mega
from tide_mega.data.atomic import write_bytes

log = logging.getLogger(__name__)

_PARTS = ("tide_mega", "conf", "slurm", "tools", "pyproject.toml", "constraints.txt")
_MOST_BYTES = 1_000_000
"""A larger file is no code: it is left out, and named."""


@dataclass(frozen=True)
class CodeSnapshot:
    """The code as it is now."""

    id: str
    """Commit, content hash, or both; equal for equal code."""
    archive: bytes
    """A tar.gz of `files`."""
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    patch: bytes
    """What `git diff` says against the commit; empty where the code is the commit's, or there is none."""


def keep_code(folder: Path) -> str | None:
    """Write the running code to `folder`, unless it is there already; return its id.

    None where it could not be written: said in the log, for a run is worth more than its copy of the code.
    """
    try:
        snapshot = running_code()
        archive = folder / f"{snapshot.id}.tar.gz"
        if not archive.exists():
            folder.mkdir(parents=True, exist_ok=True)
            if snapshot.patch:
                write_bytes(folder / f"{snapshot.id}.patch", snapshot.patch)
            write_bytes(archive, snapshot.archive)
            if snapshot.left_out:
                names = ", ".join(snapshot.left_out)
                log.warning("the copy of the code leaves out files over %d bytes: %s", _MOST_BYTES, names)
    except OSError as error:
        log.warning("the code of this start could not be kept in %s: %s", folder, error)
        return None
    return snapshot.id


@functools.cache
def running_code() -> CodeSnapshot:
    """Take the code that this process runs; later edits of the files change nothing."""
    return take(Path(tide_mega.__file__).resolve().parents[1])


def take(root: Path) -> CodeSnapshot:
    """Take the code below `root`, the folder that holds the package."""
    commit = _git(root, "rev-parse", "HEAD")
    listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *_PARTS)
    # A package installed inside someone else's checkout is not that checkout's code.
    is_checkout = (
        commit is not None and listed is not None and b"tide_mega/__init__.py" in listed.split(b"\0")
    )
    names = (name.decode() for name in (listed or b"").split(b"\0") if name) if is_checkout else _walk(root)
    content, left_out = {}, []
    for name in sorted(set(names)):
        path = root / name
        if not path.is_file():  # deleted, but not yet from the index
            continue
        if path.stat().st_size > _MOST_BYTES:
            left_out.append(name)
        else:
            content[name] = path.read_bytes()
    digest = hashlib.sha256()
    for name, data in content.items():
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    return CodeSnapshot(
        id=_name(root, commit if is_checkout else None, digest.hexdigest()),
        archive=_pack(content),
        files=tuple(content),
        left_out=tuple(left_out),
        patch=(_git(root, "diff", "--binary", "HEAD", "--", *_PARTS) or b"") if is_checkout else b"",
    )


def _name(root: Path, commit: bytes | None, content_hash: str) -> str:
    if commit is None:
        return content_hash[:12]
    short = commit.decode().strip()[:12]
    is_clean = _git(root, "status", "--porcelain", "--", *_PARTS) == b""
    return short if is_clean else f"{short}-{content_hash[:8]}"


def _walk(root: Path) -> list[str]:
    found = []
    for part in _PARTS:
        path = root / part
        files = [path] if path.is_file() else path.rglob("*")
        found += [
            file.relative_to(root).as_posix()
            for file in files
            if file.is_file() and "__pycache__" not in file.parts and file.suffix != ".pyc"
        ]
    return found


def _pack(content: dict[str, bytes]) -> bytes:
    """A tar.gz that depends on names and contents alone."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, data in content.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return gzip.compress(packed.getvalue(), mtime=0)


def _git(root: Path, *arguments: str) -> bytes | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
