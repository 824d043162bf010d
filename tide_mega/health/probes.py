"""A check that takes all nodes together: each writes a file that the others must see."""

import time
from collections.abc import Sequence
from pathlib import Path

_SEEN_WITHIN = 10.0
"""Seconds within which a file must be visible on other nodes, since shared file systems cache."""


def mark(root: Path, token: str, rank: int) -> str | None:
    """Write this node's file to `root`; return what went wrong, or None."""
    try:
        _file(root, token, rank).write_text(token)
    except OSError as error:
        return f"run.root={root} cannot be written: {error}"
    return None


def see(root: Path, token: str, ranks: Sequence[int]) -> str | None:
    """Look for the files of all nodes; return what cannot be seen, or None."""
    deadline = time.monotonic() + _SEEN_WITHIN
    unseen = list(ranks)
    while unseen and time.monotonic() < deadline:
        unseen = [rank for rank in unseen if not _holds(_file(root, token, rank), token)]
        if unseen:
            time.sleep(0.1)
    if not unseen:
        return None
    return (
        f"does not see in run.root={root} what ranks {', '.join(map(str, unseen))} wrote: not a shared folder"
    )


def unmark(root: Path, token: str, rank: int) -> None:
    """Remove this node's file."""
    try:
        _file(root, token, rank).unlink(missing_ok=True)
    except OSError:
        return  # already reported when it could not be written


def _holds(path: Path, token: str) -> bool:
    try:
        return path.read_text() == token
    except OSError:
        return False


def _file(root: Path, token: str, rank: int) -> Path:
    return root / f".health-{token}-{rank}"
