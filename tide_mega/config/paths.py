"""What a folder can be called, and whether two spellings mean one place."""

import os
import stat
import unicodedata
from pathlib import Path
from typing import Any

from tide_mega.config.errors import refuse
from tide_mega.config.urls import is_url

NAME_BYTES = 255
"""Most bytes of a file's name on the file systems of Linux and macOS."""
PATH_BYTES = 4096 - 256
"""Most bytes of a path in the kernel, less what is written below a folder that is given."""


def check_folder_name(key: str, name: str) -> None:
    """Refuse what cannot be the name of a folder.

    Raises:
        ConfigError: it is blank or too long, stands for another folder, or has a separator or a control character.
    """
    _check_characters(key, name, "give a name")
    if name in (".", "..") or "/" in name or "\\" in name:
        refuse(key, repr(name), "is not a folder's name", "use a name without path separators")
    _check_length(key, name)


def check_folder_path(key: str, path: str) -> None:
    """Refuse what cannot be the path of a folder.

    Raises:
        ConfigError: it is blank or a URL, it or a name in it is too long, or it has a control character.
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
    """Return the name of a file that something on disk gives, once it is seen to stay inside its folder.

    Raises:
        ValueError: it is no plain name, such as a path, `..` or a number.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"{_shortened(repr(name))} is not the plain name of a file")
    return name


def regular_file(folder: Path, name: Any) -> Path:
    """Return the path of a file in `folder` that something on disk names.

    Raises:
        ValueError: the name is not a plain one, or what has it is a link or anything else but a regular file.
        OSError: it cannot be looked at, or is not there (FileNotFoundError).
    """
    path = folder / plain_name(name)
    if not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError(f"{name} is {'a link' if path.is_symlink() else 'not a regular file'}")
    return path


def is_same_place(one: Any, other: Any) -> bool:
    """Whether two paths, or two lists of them, lead to the same places: relative, absolute, or through links."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(is_same_place, one, other))
    if one is None or other is None:
        return one is other
    return Path(one).resolve() == Path(other).resolve()
