"""The folder a preparation writes: whose it is, whether it may be continued, and who is at it now."""

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from tide_mega.config.errors import ConfigError
from tide_mega.data import index as index_file
from tide_mega.data.atomic import is_temporary, write_json
from tide_mega.data.worker import UNITS_FOLDER

STATE_FILE = "prepare.json"
_LOCK_FILE = ".lock"
_WRITTEN = (  # in the order of removal
    index_file.FILE_NAME,
    "tokenizer.json",
    "tokenizer.model",
    "counts.npy",
    "deciles.npy",
    "deciles.json",
    STATE_FILE,
)
State = Literal["new", "unfinished", "complete"]


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Creates `out` and holds it against a second preparation; a killed holder's lock is gone with it.

    Raises:
        ConfigError: another process holds it, or `out` cannot be a folder.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={out} cannot be made a folder: {error.strerror or error}") from error
    with (out / _LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"out={out} is being written by another preparation; wait for it or stop it"
            ) from error
        except OSError:
            pass  # a file system without locks
        yield


def examine(out: Path, identity: dict[str, Any], inputs: str, overwrite: bool) -> State:
    """Finds out what an earlier preparation left in `out`, and claims it for this one.

    Args:
        out: the folder, locked.
        identity: the options on which the output depends.
        inputs: fingerprint of the input files.
        overwrite: remove what was left rather than refuse or continue it.

    Raises:
        ConfigError: `out` holds other files, or a preparation with other options or inputs.
    """
    for path in out.iterdir():
        if is_temporary(path):
            path.unlink(missing_ok=True)
    if overwrite:
        _remove(out)
    claimed = {"options": identity, "inputs": inputs}
    state_path = out / STATE_FILE
    if not state_path.is_file():
        others = sorted(path.name for path in out.iterdir() if path.name != _LOCK_FILE)
        if others:
            raise ConfigError(
                f"out={out} holds files of another origin ({', '.join(others[:3])}); name a new folder"
            )
        write_json(state_path, claimed)
        return "new"
    earlier = json.loads(state_path.read_text(encoding="utf-8"))
    changed = [
        f"{name} was {earlier['options'].get(name)!r} and is now {value!r}"
        for name, value in identity.items()
        if earlier["options"].get(name) != value
    ]
    complete = (out / index_file.FILE_NAME).is_file()
    if earlier["inputs"] != inputs and complete:
        changed.append("the input files are other ones or were modified")
    if changed:
        raise ConfigError(
            f"out={out} was prepared differently: {'; '.join(changed)}. "
            "Name another folder, or pass overwrite=true to prepare it anew"
        )
    if earlier["inputs"] != inputs:
        # Units that are not affected stay; what depends on all of the input goes.
        if identity["bpe_train_bytes"] is not None:
            (out / "tokenizer.json").unlink(missing_ok=True)
        write_json(state_path, claimed)
    return "complete" if complete else "unfinished"


def clean_up(out: Path, shards: set[str]) -> None:
    """Removes the records of the units and any shard that the index does not name."""
    for path in out.glob("*.tar"):
        if path.name not in shards:
            path.unlink()
    shutil.rmtree(out / UNITS_FOLDER, ignore_errors=True)


def _remove(out: Path) -> None:
    """Removes what a preparation writes and nothing else; the index first, as it vouches for the rest."""
    for name in _WRITTEN[:-1]:
        (out / name).unlink(missing_ok=True)
    for split in index_file.SPLITS:
        for path in out.glob(f"{split}-[0-9]*.tar"):
            path.unlink()
    shutil.rmtree(out / UNITS_FOLDER, ignore_errors=True)
    (out / STATE_FILE).unlink(missing_ok=True)
