"""The folder that an export makes: it gets its name once it is complete; other data is never removed.

`hf` is written as `hf.partial` and renamed. If it replaces an earlier export, that one is called `hf.replaced`
between the two renames; a later start restores or removes it.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from tide_mega.errors import ConfigError, ExportError, refuse
from tide_mega.files import to_disk, unfinished
from tide_mega.jobs.lock import LOCK_FILE, FolderLock

NOTE_FILE = "export.json"
"""Records the export's inputs; its presence identifies a folder as an export."""
PARTIAL, REPLACED = ".partial", ".replaced"
_MADE = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|export|model\.safetensors\.index)\.json"
    r"|README\.md|memory\.tide|\w+_tide\.py|model(-\d{5}-of-\d{5})?\.safetensors"
)


@contextlib.contextmanager
def new_folder(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Context that provides an empty folder to write in; at its end the folder becomes `out`, unless on an error.

    Raises:
        ConfigError: `out` exists and is not an export, or `overwrite` is not set.
        FolderTakenError: another process makes the same export.
        ExportError: it could not be completed (a full disk); what was written is removed.
    """
    out = out.resolve()
    partial, replaced = out.with_name(out.name + PARTIAL), out.with_name(out.name + REPLACED)
    if replaced.is_dir() and not os.path.lexists(out) and _is_export(replaced):
        replaced.rename(out)
    _refuse_what_is_there(out, overwrite=overwrite)
    _refuse_foreign(partial)
    lock = FolderLock(partial, "an export", key="out")
    with _as_sentences(out, partial), lock:
        try:
            _empty(partial)
            (partial / NOTE_FILE).write_text(
                "{}\n", encoding="utf-8"
            )  # identifies the folder if this process is killed
            yield partial
            _commit(partial, out, replaced, overwrite=overwrite)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def require_room(folder: Path, size: int) -> None:
    """Refuse to begin an export that does not fit the disk.

    Raises:
        ExportError: the disk of `folder` has less than `size` bytes left.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ExportError(
            f"the export takes {size / 1e9:.2f} GB, and the disk of {folder.parent} has {free / 1e9:.2f} GB left: "
            "make room, choose another out, or fewer bytes by tables=int4, say."
        )


def _refuse_what_is_there(out: Path, *, overwrite: bool) -> None:
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return
    if not _is_export(out):
        others = "" if not out.is_dir() else f" ({', '.join(_others(out)[:3])})" if _others(out) else ""
        why = f"is there, and holds what is no export's{others}"
        refuse("out", out, why, "that is never removed, name a new folder")
    if not overwrite:
        refuse("out", out, "holds an export already", "name a new folder, or give overwrite=true")


def _refuse_foreign(partial: Path) -> None:
    if os.path.lexists(partial) and (partial.is_symlink() or not partial.is_dir() or _others(partial)):
        raise ConfigError(
            f"{partial}, where the export would be written until it is whole, holds what is no export's: that is "
            "never removed, name another out."
        )


def _is_export(folder: Path) -> bool:
    return folder.is_dir() and (folder / NOTE_FILE).is_file() and not _others(folder)


def _others(folder: Path) -> list[str]:
    """Return names in a folder that no export makes."""
    return sorted(path.name for path in folder.iterdir() if not _is_made_by_export(path))


def _is_made_by_export(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    name = unfinished(path.name) or path.name
    return name == LOCK_FILE or name.startswith(f".{LOCK_FILE}.") or bool(_MADE.fullmatch(name))


def _empty(partial: Path) -> None:
    for path in partial.iterdir():
        if path.name != LOCK_FILE and not path.name.startswith(f".{LOCK_FILE}."):
            path.unlink()


def _commit(partial: Path, out: Path, replaced: Path, *, overwrite: bool) -> None:
    """Rename the folder to its final name. At every instant the old or the new one is complete under some name."""
    for path in partial.iterdir():
        if path.name != LOCK_FILE:
            to_disk(path)
    to_disk(partial)
    _refuse_what_is_there(out, overwrite=overwrite)  # checked again, since the export took a while
    if out.is_dir() and any(out.iterdir()):
        if replaced.is_dir() and _is_export(replaced):
            shutil.rmtree(replaced)
        out.rename(replaced)
    partial.rename(out)
    (out / LOCK_FILE).unlink(missing_ok=True)
    to_disk(out.parent)
    if replaced.is_dir() and _is_export(replaced):
        shutil.rmtree(replaced)


@contextlib.contextmanager
def _as_sentences(out: Path, partial: Path) -> Iterator[None]:
    """Turn the disk's errors into ExportErrors, also those without a file name; errors of other files pass."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and partial not in Path(os.fsdecode(error.filename)).parents:
            raise
        raise ExportError(
            f"out={out} could not be written ({error.strerror or error}): nothing of it is left; make room or "
            "choose another place, and start again."
        ) from error
