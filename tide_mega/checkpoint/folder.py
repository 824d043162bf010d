"""The folder of checkpoints: names, what is whole, what may go.

`step-00000100` is complete: it was written as `step-00000100.partial` and renamed when the manifest and all
files were on disk. `.replaced` is a complete one that another of the same step is about to replace, `.damaged`
one that failed its checks. The folder itself may be a link, to a scratch disk for example: it stays one.

A checkpoint may be a link too, made by hand. It is read like any other; what removes or replaces it unlinks it,
and what it points to stays as it is.
"""

import logging
import os
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from tide_mega.checkpoint.errors import CheckpointError
from tide_mega.checkpoint.manifest import STATE_FILE, FileRecord, Manifest
from tide_mega.checkpoint.state import SavedState
from tide_mega.data.atomic import to_disk

log = logging.getLogger(__name__)

PARTIAL, REPLACED, DAMAGED = ".partial", ".replaced", ".damaged"
COMPLETE = re.compile(rf"step-(\d+)({re.escape(REPLACED)})?")
_LEFTOVER = re.compile(rf"{COMPLETE.pattern}{re.escape(PARTIAL)}")


@dataclass(frozen=True)
class CheckpointFolder:
    """Checkpoints of one run in one place; only one process writes."""

    path: Path

    def complete(self) -> list[Path]:
        """Return folders with a complete checkpoint's name, oldest first."""
        found = [path for path in self.path.glob("step-*") if COMPLETE.fullmatch(path.name) and _is_dir(path)]
        return sorted(found, key=lambda path: (step_of(path), not path.name.endswith(REPLACED)))

    def final(self, step: int) -> Path:
        """Return the folder of a complete checkpoint."""
        return self.path / f"step-{step:08d}"

    def partial(self, step: int) -> Path:
        """Return the folder in which a checkpoint is written."""
        return self.path / f"step-{step:08d}{PARTIAL}"

    def prepare(self, step: int) -> None:
        """Make an empty folder to write in, and drop what killed saves left."""
        self.path.resolve().mkdir(parents=True, exist_ok=True)  # resolved: a link may point to what is gone
        for leftover in [path for path in self.path.iterdir() if _LEFTOVER.fullmatch(path.name)]:
            _remove(leftover)
        for replaced in self.path.glob(f"step-*{REPLACED}"):
            if COMPLETE.fullmatch(replaced.stem) and _is_dir(replaced.with_suffix("")):
                _remove(replaced)
        partial = self.partial(step)
        partial.mkdir(exist_ok=not partial.is_symlink())  # one that could not be removed must not be followed

    def commit(self, step: int, save_id: str, state: str, files: dict[str, FileRecord]) -> None:
        """Finish what was written in `partial(step)`: state, then manifest, then the name.

        At every instant either the old or the new checkpoint of this step can be found.
        """
        partial, final = self.partial(step), self.final(step)
        (partial / STATE_FILE).write_text(state, encoding="utf-8")
        for name in files:
            to_disk(partial / name)
        to_disk(partial / STATE_FILE)
        files = {**files, STATE_FILE: FileRecord.of(partial / STATE_FILE)}
        Manifest(step, save_id, files).write(partial)
        to_disk(partial)
        replaced = final.with_name(final.name + REPLACED)
        if os.path.lexists(final):
            if replaced.is_symlink():
                replaced.unlink()
            elif replaced.exists():
                shutil.rmtree(replaced)
            final.rename(replaced)
        partial.rename(final)
        to_disk(self.path)
        if os.path.lexists(replaced):
            _remove(replaced)

    def discard(self, step: int) -> None:
        """Remove a save that failed."""
        partial = self.partial(step)
        if partial.is_symlink():
            _remove(partial)
        else:
            shutil.rmtree(partial, ignore_errors=True)

    def retain(
        self, keep_last: int, keep_every: int | None, newest: int, in_use: Collection[int] = ()
    ) -> None:
        """Remove all but the last ones, milestones, and those at multiples of `keep_every` steps.

        `newest` is the step just saved, which stays whatever else lies here; so do the steps `in_use`.
        """
        complete = self.complete()
        for old in complete[:-keep_last]:
            step = step_of(old)
            if (
                step == newest
                or step in in_use
                or (keep_every and (step % keep_every == 0 or _is_milestone(old)))
            ):
                continue
            if old.is_symlink():
                _remove(old)
                continue
            out_of_sight = old.with_name(old.name + PARTIAL)
            if out_of_sight.is_symlink():
                _remove(out_of_sight)
            try:
                # Out of sight first: half a checkpoint must not keep the name of a whole one.
                old.rename(out_of_sight)
            except OSError as error:
                log.warning("%s could not be removed (%s); it stays", old, error)
            else:
                _remove(out_of_sight)

    def mark_damaged(self, path: Path) -> Path | None:
        """Rename a checkpoint that failed its checks; None where the folder cannot be written."""
        try:
            return path.rename(_free_name(path.with_name(path.name + DAMAGED)))
        except OSError:
            return None

    def set_aside(self) -> Path | None:
        """Move the checkpoints to a new folder beside this one, if there are any; return it.

        Where this folder is a link, beside the one that it points to. What else is in it, such as a run's mark,
        stays. The newest goes first: a start that is killed here leaves no checkpoint that is newer than one
        already moved.
        """
        complete = self.complete()
        if not complete:
            return None
        folder = self.path.resolve()
        target = _free_name(folder.with_name(folder.name + REPLACED))
        target.mkdir()
        others = sorted(path for path in self.path.glob("step-*") if path not in complete)
        for path in [*reversed(complete), *others]:
            path.rename(target / path.name)
        return target


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a link to where nobody may look
        return False


def _free_name(path: Path) -> Path:
    """Return `path` with the first number that nothing there has, not even a broken link."""
    number = 1
    while os.path.lexists(target := path.with_name(f"{path.name}-{number}")):
        number += 1
    return target


def _remove(path: Path) -> None:
    """Remove what no longer counts; what cannot go (a file open elsewhere, over NFS) must not stop a save."""
    try:
        if not path.is_symlink() and path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        log.warning("%s could not be removed whole (%s); what is left is in nobody's way", path, error)


def step_of(path: Path) -> int:
    """Return the step that a complete checkpoint's name tells."""
    match = COMPLETE.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name} is not the name of a checkpoint")
    return int(match[1])


def _is_milestone(path: Path) -> bool:
    if path.is_symlink():
        return False
    try:
        return SavedState.read(path).progress.is_milestone
    except CheckpointError:
        return False
