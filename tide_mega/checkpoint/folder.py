"""The folder of checkpoints: names, what is whole, what may go.

`step-00000100` is complete: it was written as `step-00000100.partial` and renamed when the manifest and all
files were on disk. `.replaced` is a complete one that another of the same step is about to replace, `.damaged`
one that failed its checks.
"""

import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from tide_mega.checkpoint.manifest import STATE_FILE, FileRecord, Manifest
from tide_mega.data.atomic import to_disk

log = logging.getLogger(__name__)

PARTIAL, REPLACED, DAMAGED = ".partial", ".replaced", ".damaged"
COMPLETE = re.compile(rf"step-(\d+)({re.escape(REPLACED)})?")


@dataclass(frozen=True)
class CheckpointFolder:
    """Checkpoints of one run in one place; only one process writes."""

    path: Path

    def complete(self) -> list[Path]:
        """Return folders with a complete checkpoint's name, oldest first."""
        found = [path for path in self.path.glob("step-*") if COMPLETE.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=lambda path: (step_of(path), not path.name.endswith(REPLACED)))

    def final(self, step: int) -> Path:
        """Return the folder of a complete checkpoint."""
        return self.path / f"step-{step:08d}"

    def partial(self, step: int) -> Path:
        """Return the folder in which a checkpoint is written."""
        return self.path / f"step-{step:08d}{PARTIAL}"

    def prepare(self, step: int) -> None:
        """Make an empty folder to write in, and drop what killed saves left."""
        self.path.mkdir(parents=True, exist_ok=True)
        for leftover in self.path.glob(f"*{PARTIAL}"):
            shutil.rmtree(leftover)
        for replaced in self.path.glob(f"step-*{REPLACED}"):
            if replaced.with_suffix("").exists():
                shutil.rmtree(replaced)
        self.partial(step).mkdir()

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
        if final.exists():
            if replaced.exists():
                shutil.rmtree(replaced)
            final.rename(replaced)
        partial.rename(final)
        to_disk(self.path)
        if replaced.exists():
            shutil.rmtree(replaced)

    def discard(self, step: int) -> None:
        """Remove a save that failed."""
        shutil.rmtree(self.partial(step), ignore_errors=True)

    def retain(self, keep_last: int, keep_every: int | None, newest: int) -> None:
        """Remove all but the last ones and those at multiples of `keep_every` steps.

        `newest` is the step just saved, which stays whatever else lies here.
        """
        complete = self.complete()
        for old in complete[:-keep_last]:
            step = step_of(old)
            if step == newest or (keep_every and step % keep_every == 0):
                continue
            try:
                # Out of sight first: half a checkpoint must not keep the name of a whole one.
                shutil.rmtree(old.rename(old.with_name(old.name + PARTIAL)))
            except OSError as error:
                log.warning("%s could not be removed (%s); it stays", old, error)

    def mark_damaged(self, path: Path) -> Path | None:
        """Rename a checkpoint that failed its checks; None where the folder cannot be written."""
        number = 1
        while (target := path.with_name(f"{path.name}{DAMAGED}-{number}")).exists():
            number += 1
        try:
            return path.rename(target)
        except OSError:
            return None

    def set_aside(self) -> Path | None:
        """Rename the whole folder, if there are checkpoints in it; return its new name."""
        if not self.complete():
            return None
        number = 1
        while (target := self.path.with_name(f"{self.path.name}.replaced-{number}")).exists():
            number += 1
        return self.path.rename(target)


def step_of(path: Path) -> int:
    """Return the step that a complete checkpoint's name tells."""
    match = COMPLETE.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name} is not the name of a checkpoint")
    return int(match[1])
