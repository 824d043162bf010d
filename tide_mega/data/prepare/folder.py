"""The output folder of a preparation: who owns it, whether it can be continued, and who is using it now.

Only what a preparation creates is ever removed, by name, and only from a folder known to be a preparation's. A
dataset that is to be replaced stays while the new one is made in its subfolder `replacement`; once that has its
index it is moved into place, which a later start completes if this one is killed.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tide_mega.data.index import FILE_NAME as INDEX_FILE
from tide_mega.data.index import DatasetIndex
from tide_mega.data.prepare.worker import SHARD_NAME, UNIT_FILE, UNITS_FOLDER
from tide_mega.errors import ConfigError, DataError
from tide_mega.files import parse_json, to_disk, unfinished, write_json
from tide_mega.jobs.lock import LOCK_FILE, FolderLock

STATE_FILE = "prepare.json"
REPLACEMENT = "replacement"
_OLD_LOCK = ".lock"
"""Lock file of earlier versions."""
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_WRITTEN = {
    *(INDEX_FILE, STATE_FILE, *_TOKENIZERS),
    *("counts.npy", "deciles.npy", "deciles.json"),
}


def locked(out: Path) -> FolderLock:
    """Return a context manager that locks `out` against other preparations, and creates it.

    Raises:
        FolderTakenError: another process holds it (raised on entering).
        ConfigError: `out` cannot be a folder, or is not writable.
    """
    return FolderLock(out, "a preparation", key="out")


def examine(out: Path, identity: dict[str, Any], inputs: str, overwrite: bool) -> tuple[Path, bool]:
    """Determine what an earlier preparation left in `out`, and claim it for this one; removes no finished file.

    Args:
        out: the folder, locked.
        identity: the options on which the output depends.
        inputs: fingerprint of the input files.
        overwrite: prepare anew instead of refusing or continuing what was left.

    Returns:
        The folder to prepare in (`out`, or the one whose content will replace it), and whether a dataset with
        these options and inputs is already complete there.

    Raises:
        ConfigError: `out` holds other files, or a preparation with other options or inputs.
    """
    claimed = {"options": identity, "inputs": inputs}
    if (out / REPLACEMENT / INDEX_FILE).is_file() and _is_own(out):
        finish_replacement(out)
        overwrite = overwrite and _read_state(out) != claimed
    begun = [path.name for path in out.iterdir() if not _is_lock(path.name) and not _is_half_claim(path.name)]
    if not begun:
        write_json(out / STATE_FILE, claimed)
        _remove_unfinished(out)
        return out, False
    if overwrite:
        return _begin_replacement(out, claimed), False
    if not (out / STATE_FILE).is_file():
        raise _foreign(out, begun)
    return out, _continue(out, claimed)


def clean_up(folder: Path, index: DatasetIndex) -> None:
    """Remove the unit records, and any shard of a preparation that the index does not name."""
    named = _shards_of(index)
    for path in folder.iterdir():
        if SHARD_NAME.fullmatch(path.name) and path.name not in named:
            path.unlink()
    _remove_units(folder)


def finish_replacement(out: Path) -> None:
    """Move the complete dataset in `out`/replacement to `out`, removing what it does not replace there.

    The index is moved last; until then the next start, or the next call, continues wherever this one stopped.
    """
    new = out / REPLACEMENT
    index = DatasetIndex.load(new)
    if (
        new / STATE_FILE
    ).is_file():  # first, so that `out` is recognisable as a preparation's at every instant
        (new / STATE_FILE).replace(out / STATE_FILE)
    (out / INDEX_FILE).unlink(missing_ok=True)  # it vouches for files that are about to be removed
    for path in sorted(new.iterdir()):
        if path.name != INDEX_FILE and path.is_file() and _is_made_by_preparation(path):
            path.replace(out / path.name)
    clean_up(out, index)
    for name in _TOKENIZERS:
        if name != index.tokenizer.file:
            (out / name).unlink(missing_ok=True)
    _remove_units(new)
    to_disk(out)
    (new / INDEX_FILE).replace(out / INDEX_FILE)
    to_disk(out)
    _remove_folder(new)


def _continue(folder: Path, claimed: dict[str, Any]) -> bool:
    """Continue what an earlier preparation left; return whether it is complete.

    Raises:
        ConfigError: it had other options or inputs.
    """
    earlier = _read_state(folder)
    if earlier is None:
        remedy = ", or pass overwrite=true to prepare it anew" if _is_own(folder) else ""
        raise ConfigError(
            f"{folder / STATE_FILE} is damaged and no longer says what out={folder} was prepared from. Name "
            f"another folder{remedy}"
        )
    identity, was = claimed["options"], earlier["options"]
    changed = [
        f"{name} was {was[name]!r} and is now {value!r}"
        for name, value in identity.items()
        if name in was and was[name] != value  # state files of earlier versions lack newer options
    ]
    is_complete = (folder / INDEX_FILE).is_file()
    has_other_inputs = earlier["inputs"] != claimed["inputs"]
    if has_other_inputs and is_complete:
        changed.append("the input files are other ones or were modified")
    if changed:
        raise ConfigError(
            f"out={folder} was prepared differently: {'; '.join(changed)}. "
            "Name another folder, or pass overwrite=true to prepare it anew"
        )
    _remove_unfinished(folder)
    if has_other_inputs:
        # Unaffected units stay; what depends on all of the input is removed.
        if identity["bpe_train_bytes"] is not None:
            (folder / "tokenizer.json").unlink(missing_ok=True)
        write_json(folder / STATE_FILE, claimed)
    return is_complete


def _begin_replacement(out: Path, claimed: dict[str, Any]) -> Path:
    """Return the folder that will replace the content of `out`: one begun with the same options, or an empty one.

    Raises:
        ConfigError: `out` contains anything that no preparation made.
    """
    others = sorted(path.name for path in out.iterdir() if not _is_made_by_preparation(path))
    if others or not _is_own(out):
        raise _foreign(out, others or [path.name for path in out.iterdir() if not _is_lock(path.name)])
    _remove_unfinished(out)
    new = out / REPLACEMENT
    if new.is_dir():
        try:
            _continue(new, claimed)
            return new
        except ConfigError:
            _remove_units(new)
            for path in new.iterdir():
                path.unlink()
    new.mkdir(exist_ok=True)
    write_json(new / STATE_FILE, claimed)
    return new


def _foreign(out: Path, names: list[str]) -> ConfigError:
    return ConfigError(
        f"out={out} holds files of another origin ({', '.join(sorted(names)[:3])}), which are never removed; "
        "name a new folder"
    )


def _read_state(folder: Path) -> dict[str, Any] | None:
    """Return the options and inputs of the preparation in `folder`; None if there is no readable state file."""
    try:
        state = parse_json((folder / STATE_FILE).read_text(encoding="utf-8"))
        return {"options": dict(state["options"]), "inputs": str(state["inputs"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_own(out: Path) -> bool:
    """Return whether a preparation made `out`; common names such as tokenizer.json are no evidence."""
    if _read_state(out) is not None:
        return True
    try:
        DatasetIndex.load(out)
    except (DataError, OSError):
        return False
    return True


def _is_lock(name: str) -> bool:
    return name in (LOCK_FILE, _OLD_LOCK) or name.startswith(f".{LOCK_FILE}.")


def _is_half_claim(name: str) -> bool:
    return unfinished(name) == STATE_FILE


def _is_made_by_preparation(path: Path) -> bool:
    """Return whether a preparation creates entries of this name and kind; it never makes links."""
    if path.is_symlink():
        return False
    if path.is_dir():
        if path.name == UNITS_FOLDER:
            return all(_is_file_named(inner, UNIT_FILE.fullmatch) for inner in path.iterdir())
        return path.name == REPLACEMENT and all(_is_made_by_preparation(inner) for inner in path.iterdir())
    return _is_lock(path.name) or _is_file_named(
        path, lambda name: name in _WRITTEN or SHARD_NAME.fullmatch(name)
    )


def _is_file_named(path: Path, is_name: Callable[[str], object]) -> bool:
    """Return whether it is a file of such a name, or the temporary file that a killed writer left of one."""
    return path.is_file() and not path.is_symlink() and bool(is_name(unfinished(path.name) or path.name))


def _remove_unfinished(folder: Path) -> None:
    for path in folder.iterdir():
        if unfinished(path.name) is not None and _is_made_by_preparation(path):
            path.unlink(missing_ok=True)


def _remove_units(folder: Path) -> None:
    units = folder / UNITS_FOLDER
    if not units.is_dir() or units.is_symlink():
        return
    for path in units.iterdir():
        if _is_file_named(path, UNIT_FILE.fullmatch):
            path.unlink(missing_ok=True)
    _remove_folder(units)


def _remove_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # it contains a foreign file, or one that is open elsewhere over NFS
        folder.rmdir()


def _shards_of(index: DatasetIndex) -> set[str]:
    return {shard.file for split in index.splits.values() for shard in split.shards}
