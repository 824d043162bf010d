"""One save from snapshot to commit: what the background thread does, or the training thread itself."""

import logging
import shutil
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch.distributed import ProcessGroup

from tide_mega.checkpoint import owner
from tide_mega.checkpoint.errors import CheckpointError
from tide_mega.checkpoint.folder import CheckpointFolder
from tide_mega.checkpoint.manifest import MANIFEST_FILE, STATE_FILE, FileRecord, Manifest
from tide_mega.checkpoint.planners import Stored, write
from tide_mega.checkpoint.state import SavedState
from tide_mega.checkpoint.storage import BoxWriter
from tide_mega.checkpoint.together import from_first, is_first, on_all, place
from tide_mega.data.atomic import to_disk

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay."""

    last: int
    every: int | None = None
    """Steps; those at its multiples stay for ever."""


@dataclass(frozen=True)
class Destinations:
    """Where checkpoints go."""

    local: CheckpointFolder
    keep: Keep
    remote: CheckpointFolder | None
    remote_keep: Keep
    in_use: Callable[[], Collection[int]] = tuple
    """Steps whose local checkpoints somebody is reading: they stay for the time being."""


@dataclass(frozen=True)
class Written:
    """What a save did."""

    size: int
    """Bytes of all files."""
    seconds: float


class Savable(Protocol):
    """What a process has to save."""

    def check(self) -> None:
        """Raise what kept this process from taking part."""

    def boxes(self) -> list[Stored]:
        """Return this process's boxes; collective."""


def save(
    snapshot: Savable,
    state: SavedState,
    to: Destinations,
    group: ProcessGroup | None,
    *,
    disk_is_full: bool = False,
) -> Written:
    """Write, commit, copy to the remote folder, drop old ones; collective over `group`, or by this process alone.

    `disk_is_full` is a fault brought about on purpose: this rank's file cannot be written to its end.

    Raises:
        CheckpointError: it failed somewhere, on every rank alike. What was being written is gone, unless the
            message says that it is whole in the local folder.
    """
    start, step = time.monotonic(), state.progress.step
    on_all(group, snapshot.check)
    boxes = snapshot.boxes()
    writer = BoxWriter(
        to.local.partial(step),
        state.save_id,
        prepare=lambda: to.local.prepare(step),
        commit=lambda files: to.local.commit(step, state.save_id, state.dump(), files),
        disk_is_full=disk_is_full,
    )
    try:
        write(boxes, writer, group)
    except CheckpointError as error:
        if is_first(group):
            to.local.discard(step)
        raise CheckpointError(f"the checkpoint of step {step} {error}") from error

    def conclude() -> Manifest:
        to.local.retain(to.keep.last, to.keep.every, step, to.in_use())
        return Manifest.read(to.local.final(step))

    manifest = from_first(group, conclude)
    if to.remote is not None:
        _copy(step, manifest, to, to.remote, group)
    size = sum(record.size for record in manifest.files.values())
    return Written(size, time.monotonic() - start)


def _copy(
    step: int,
    manifest: Manifest,
    to: Destinations,
    remote: CheckpointFolder,
    group: ProcessGroup | None,
) -> None:
    """Copy a finished checkpoint file by file, each rank some of them; the manifest goes last."""
    rank, size = place(group)
    source, target = to.local.final(step), remote.partial(step)
    names = sorted(name for name in manifest.files if name != STATE_FILE)

    def prepare() -> None:
        if is_first(group):
            remote.prepare(step)

    def look() -> None:
        if is_first(group):
            owner.keep(to.local.path.parent, remote.path)

    def copy() -> None:
        for name in names[rank::size]:
            _copy_file(source / name, target / name, manifest.files[name])

    def commit() -> None:
        if is_first(group):
            state = (source / STATE_FILE).read_text(encoding="utf-8")
            remote.commit(step, manifest.save_id, state, {name: manifest.files[name] for name in names})
            remote.retain(to.remote_keep.last, to.remote_keep.every, step)

    is_ours = False
    try:
        on_all(group, look)
        is_ours = True
        for part in (prepare, copy, commit):
            on_all(group, part)
    except CheckpointError as error:
        if is_ours and is_first(group):
            remote.discard(step)
        raise CheckpointError(
            f"the checkpoint of step {step} is whole in {source}, but could not be copied to {remote.path} "
            f"({error})"
        ) from error


def _copy_file(source: Path, target: Path, record: FileRecord) -> None:
    shutil.copyfile(source, target)
    to_disk(target)
    if FileRecord.of(target) != record:
        raise CheckpointError(f"{target} is not what {source.parent / MANIFEST_FILE} says")
