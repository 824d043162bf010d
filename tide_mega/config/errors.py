"""Errors that end a command in one sentence, without a traceback, and the one a user's configuration can cause."""

import errno
import os
import unicodedata
from typing import Any, ClassVar, NoReturn

from tide_mega.config.exits import Exit
from tide_mega.config.urls import has_credentials, without_credentials


class StatedError(Exception):
    """What ends a command in one sentence; every entry point prints it and exits with the class's status.

    The message says what was wrong, where, and what to do about it.
    """

    exit_status: ClassVar[Exit] = Exit.ERROR
    has_lines: ClassVar[bool] = False
    """Whether the message is a report of several lines."""

    def __str__(self) -> str:
        """Return the message as it may be printed and kept.

        Line breaks and other control characters, which names of files may have, are escaped, and URLs stand
        without their credentials.
        """
        text = without_credentials(super().__str__())
        return text if self.has_lines else printable(text)


def printable(text: str) -> str:
    """Return a text, which may have names of files in it, with line breaks and other control characters escaped.

    A terminal would obey them, and a line break would begin what looks like a line of its own.
    """
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        else character
        for character in text
    )


class PlaceError(StatedError):
    """A file or folder that the system does not let a command use."""


_FULL = (errno.ENOSPC, errno.EDQUOT)
_OF_THE_PLACE = {
    errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EEXIST, errno.ENOTEMPTY,
    errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.EIO, errno.ESTALE, *_FULL,
}  # fmt: skip


def of_the_place(error: OSError) -> PlaceError | None:
    """Return what a user can be told of an error that the place of a file explains; None for any other."""
    if error.errno not in _OF_THE_PLACE or error.filename is None:
        return None
    place = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else error.filename
    remedy = "make room, and start again" if error.errno in _FULL else "mend it, or choose another place"
    return PlaceError(f"{place} cannot be used ({error.strerror}): {remedy}.")


class ConfigError(StatedError, ValueError):
    """A configuration that cannot run.

    The message is one sentence that names the key, the value it has, and a value that would do.
    """

    exit_status = Exit.CONFIG


def refuse_credentials(key: str, text: str) -> None:
    """Refuse a URL with a password or a token: options are stored, printed, and seen by all users in `ps`."""
    if has_credentials(text):
        refuse(key, text, "has a user, password or token in its URL, and is stored", "leave that out")


def refuse_huge(key: str, value: Any) -> None:
    """Refuse a whole number of more than 64 bits, which libraries answer with an error of theirs."""
    if isinstance(value, int) and abs(value) >= 2**63:
        refuse(key, value, "has more than 64 bits", "use a smaller one")


def refuse(key: str, value: Any, why: str, remedy: str) -> NoReturn:
    """Raise ConfigError with the sentence `key=value why: remedy.`"""
    shown = "null" if value is None else value
    raise ConfigError(f"{key}={shown} {why}: {remedy}.")
