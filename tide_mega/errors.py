"""Errors that end a command with a one-sentence message, exit statuses of commands, and removal of credentials.

Exit statuses tell which failures are worth another start: `slurm/body.sh` decides by them, and a test compares its
numbers with those here. A `StatedError` ends a command with its message instead of a traceback; there is a
subclass for each part of the system (configuration, data, checkpoints, export, generation, evaluation,
dashboards). URLs in anything stored or printed are stripped of passwords and tokens.
"""

import errno
import os
import re
import unicodedata
from enum import IntEnum
from typing import Any, ClassVar, NoReturn


class Exit(IntEnum):
    """Exit statuses of processes."""

    DONE = 0
    ERROR = 1
    """An unexpected error, with its traceback; of a tool also that the object it examined is faulty."""
    CONFIG = 2
    """A configuration that cannot run; starting again would fail in the same way."""
    DATA = 3
    """Data that is missing or damaged."""
    DIVERGED = 4
    """Loss or gradient repeatedly not finite, or too many rollbacks."""
    UNHEALTHY = 5
    """The health check before the run found a node that must not take part."""
    CHECKPOINT = 6
    """A checkpoint could not be written (a full disk), or none of the existing ones is usable."""
    TAKEN = 7
    """Another process is using the run folder."""
    SWEEP = 8
    """Some points of a sweep failed; the others are done, and the summary gives each failed point's status."""
    STOPPED = 75
    """Stopped on request (preemption, time limit, Ctrl-C) after saving a checkpoint. EX_TEMPFAIL of sysexits.h."""
    HUNG = 76
    """The watchdog ended a process that made no progress."""


_IN_FRONT = re.compile(r"(?<=://)[^/?#\s'\"]*@")
_SECRET_KEY = r"[^=&;\s]*(?:token|key|secret|passw|signature|sig|auth|credential)[^=&;\s]*"
_IN_QUERY = re.compile(rf"([?&;]{_SECRET_KEY}=)[^&;#\s'\"]+", re.IGNORECASE)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def without_credentials(text: str) -> str:
    """Return `text` with user, password and query tokens removed from every URL in it."""
    return _IN_QUERY.sub(r"\1***", _IN_FRONT.sub("", text))


def has_credentials(text: str) -> bool:
    """Return whether a URL in `text` has a user, a password or a token."""
    return "://" in text and without_credentials(text) != text


def is_url(path: str) -> bool:
    """Return whether a supposed path is a URL."""
    return _URL.match(path) is not None


class StatedError(Exception):
    """Ends a command with a one-sentence message; every entry point prints it and exits with the class's status.

    The message says what was wrong, where, and what to do about it.
    """

    exit_status: ClassVar[Exit] = Exit.ERROR
    has_lines: ClassVar[bool] = False
    """Whether the message is a report of several lines."""

    def __str__(self) -> str:
        """Return the message in a form that is safe to print and store.

        Line breaks and other control characters, which file names may contain, are escaped, and credentials
        removed from URLs.
        """
        text = without_credentials(super().__str__())
        return text if self.has_lines else printable(text)


def printable(text: str) -> str:
    """Return a text, which may contain file names, with line breaks and other control characters escaped.

    A terminal would interpret them, and a line break would fake a line of its own.
    """
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        else character
        for character in text
    )


class PlaceError(StatedError):
    """A file or folder that the operating system does not let a command use."""


_FULL = (errno.ENOSPC, errno.EDQUOT)
_OF_THE_PLACE = {
    errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EEXIST, errno.ENOTEMPTY,
    errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.EIO, errno.ESTALE, *_FULL,
}  # fmt: skip


def of_the_place(error: OSError) -> PlaceError | None:
    """Return a stated error for an OSError that is due to the location of a file; None for any other."""
    if error.errno not in _OF_THE_PLACE or error.filename is None:
        return None
    place = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else error.filename
    remedy = "make room, and start again" if error.errno in _FULL else "mend it, or choose another place"
    return PlaceError(f"{place} cannot be used ({error.strerror}): {remedy}.")


class ConfigError(StatedError, ValueError):
    """A configuration that cannot run.

    The message is one sentence that names the key, its value, and a value that would be valid.
    """

    exit_status = Exit.CONFIG


def refuse_credentials(key: str, text: str) -> None:
    """Refuse a URL with a password or token: options are stored, printed, and visible to all users in `ps`."""
    if has_credentials(text):
        refuse(key, text, "has a user, password or token in its URL, and is stored", "leave that out")


def refuse_huge(key: str, value: Any) -> None:
    """Refuse an integer of more than 64 bits, at which libraries fail with errors of their own."""
    if isinstance(value, int) and abs(value) >= 2**63:
        refuse(key, value, "has more than 64 bits", "use a smaller one")


def refuse(key: str, value: Any, why: str, remedy: str) -> NoReturn:
    """Raise ConfigError with the message `key=value why: remedy.`"""
    shown = "null" if value is None else value
    raise ConfigError(f"{key}={shown} {why}: {remedy}.")


class DataError(StatedError, ValueError):
    """Input text or a prepared dataset that cannot be used.

    The message says what was wrong, where, and what to do about it.
    """

    exit_status = Exit.DATA


class UnreadableShardError(DataError):
    """A shard of a prepared dataset that cannot be read, entirely or at one place."""

    def __init__(self, message: str, shard: str = "") -> None:
        super().__init__(message)
        self.shard = shard
        """Its file name in the dataset."""


class CheckpointError(StatedError, RuntimeError):
    """A checkpoint could not be written, or none is usable; raised on every rank."""

    exit_status = Exit.CHECKPOINT


class ExportError(StatedError, RuntimeError):
    """An export that could not be completed; nothing of it is left."""


class FolderError(StatedError, ValueError):
    """An exported folder that cannot be used: a file is missing, damaged, of another model, or not supported."""

    exit_status = Exit.DATA


class GenerationError(StatedError, RuntimeError):
    """Generation that cannot continue; it never writes wrong text instead."""


class EvaluationError(StatedError, RuntimeError):
    """An evaluation that cannot continue; the message says why and on which rank."""


class BrokenReplicaError(EvaluationError):
    """A process failed while others of its replica may be waiting for it: it must exit, and with it the job."""


class DashboardError(StatedError, ValueError):
    """A run that cannot be read, or a workspace that cannot be saved; the message says what to do."""
