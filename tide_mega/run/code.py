"""Keeps the code of every start in the run folder: one archive for each state that the code was in.

An archive is named after the commit, and also after its content if that differs from the commit or there is no
checkout. It holds whole files, so that no repository is needed to read it: the files that git tracks, with their
uncommitted changes. Links are never followed, files whose names suggest secrets are never read, and the folder is
accessible to its owner only.
"""

import functools
import gzip
import hashlib
import io
import logging
import os
import stat
import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

import tide_mega
from tide_mega.errors import printable
from tide_mega.files import write_bytes

log = logging.getLogger(__name__)

_PARTS = ("tide_mega", "conf", "slurm", "tools", "pyproject.toml", "constraints.txt")
_MOST_BYTES = 1_000_000
"""Size limit of a file: a larger one is not code, and is left out and listed."""
_MOST_NAMED = 20
_SECRET_NAMES = (
    ".env*", "*.env", ".netrc", "_netrc", ".pgpass", ".pypirc", ".npmrc", ".aws", ".ssh", ".gnupg", ".kube",
    "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.kdbx", "*.keytab", "*.gpg", "*.asc",
    "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*",
    "*secret*", "*credential*", "*password*", "*passwd*", "*api_key*", "*api-key*", "*apikey*",
    "token", "token.*", "tokens", "*_token", "*_token.*", "*-token", "*-token.*",
)  # fmt: skip
"""Lower-case patterns for the components of a path."""


@dataclass(frozen=True)
class CodeSnapshot:
    """The code at one point in time."""

    id: str
    """Commit, content hash, or both; equal for equal code."""
    archive: bytes
    """A tar.gz of `files`."""
    files: tuple[str, ...]
    left_out: Mapping[str, str]
    """Files among the code that are not in the archive, with the reason."""
    patch: bytes
    """`git diff` against the commit; empty if the code equals the commit or there is none."""


def keep_code(folder: Path) -> str | None:
    """Write the running code to `folder`, unless it is already there; return its id.

    Returns None if it cannot be written, which is only logged: a run is worth more than the copy of its code.
    """
    try:
        snapshot = running_code()
        archive = folder / f"{snapshot.id}.tar.gz"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        if not archive.exists():
            if snapshot.patch:
                write_bytes(folder / f"{snapshot.id}.patch", snapshot.patch, mode=0o600)
            write_bytes(archive, snapshot.archive, mode=0o600)
            if snapshot.left_out:
                log.warning("the copy of the code leaves out %s", _named(snapshot.left_out))
    except OSError as error:
        log.warning("the code of this start could not be kept in %s: %s", folder, error)
        return None
    return snapshot.id


def _named(left_out: Mapping[str, str]) -> str:
    names = [f"{printable(name)} ({why})" for name, why in left_out.items()]
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


@functools.cache
def running_code() -> CodeSnapshot:
    """Return the code that this process runs; later edits of the files have no effect."""
    return take(Path(tide_mega.__file__).resolve().parents[1])


def take(root: Path) -> CodeSnapshot:
    """Return a snapshot of the code below `root`, the folder that contains the package."""
    commit = _git(root, "rev-parse", "HEAD")
    tracked = _list(root, "--cached")
    # A package installed inside someone else's checkout is not that checkout's code.
    is_checkout = commit is not None and "tide_mega/__init__.py" in tracked
    names = tracked if is_checkout else _walk(root)
    content: dict[str, bytes] = {}
    left_out: dict[str, str] = {}
    for name in names:
        if _is_secret(name):
            left_out[name] = "a secret's name"
        elif reason := _why_not(root, name):
            left_out[name] = reason
        elif (data := _read(root / name)) is not None:  # None: deleted, but still in the index
            content[name] = data
    patch = b""
    if is_checkout:
        # git's settings might have an external program show the changes.
        shown = ("--binary", "--no-ext-diff", "--no-textconv", "HEAD", "--", *_PARTS)
        patch = _git(root, "diff", *shown, *(f":(exclude,literal){name}" for name in left_out)) or b""
        left_out |= dict.fromkeys(_list(root, "--others", "--exclude-standard"), "not tracked by git")
    digest = hashlib.sha256()
    for name, data in content.items():
        digest.update(os.fsencode(name) + f"\0{len(data)}\0".encode() + data)
    return CodeSnapshot(
        id=_name(root, commit if is_checkout else None, digest.hexdigest()),
        archive=_pack(content),
        files=tuple(content),
        left_out=left_out,
        patch=patch,
    )


def _is_secret(name: str) -> bool:
    parts = PurePosixPath(name.lower()).parts
    return any(fnmatch(part, pattern) for part in parts for pattern in _SECRET_NAMES)


def _why_not(root: Path, name: str) -> str | None:
    """Return why a file must not be read; None if it may be, or does not exist."""
    path = root
    for part in PurePosixPath(name).parts:
        path = path / part
        if path.is_symlink():
            return "a link"
    if path.is_file() and path.stat().st_size > _MOST_BYTES:
        return f"over {_MOST_BYTES} bytes"
    return None


def _read(path: Path) -> bytes | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        return file.read() if stat.S_ISREG(os.fstat(descriptor).st_mode) else None


def _name(root: Path, commit: bytes | None, content_hash: str) -> str:
    if commit is None:
        return content_hash[:12]
    short = commit.decode().strip()[:12]
    is_clean = _git(root, "status", "--porcelain", "--untracked-files=no", "--", *_PARTS) == b""
    return short if is_clean else f"{short}-{content_hash[:8]}"


def _list(root: Path, *which: str) -> list[str]:
    listed = _git(root, "ls-files", "-z", *which, "--", *_PARTS) or b""
    return sorted({os.fsdecode(name) for name in listed.split(b"\0") if name})


def _walk(root: Path) -> list[str]:
    found = [part for part in _PARTS if (root / part).is_file()]
    for part in _PARTS:
        for folder, _, names in os.walk(root / part):
            below = Path(folder).relative_to(root)
            if "__pycache__" not in below.parts:
                found += [(below / name).as_posix() for name in names if not name.endswith(".pyc")]
    return sorted(found)


def _pack(content: dict[str, bytes]) -> bytes:
    """Return a tar.gz that is a function of names and contents alone."""
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
