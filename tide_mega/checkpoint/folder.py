"""The folder of a run's checkpoints: names, ownership, retention, and the search for the newest whole checkpoint.

`step-00000100` is complete: it was written as `step-00000100.partial` and renamed once the manifest and all
files were on disk. `.replaced` is a complete checkpoint that another of the same step is about to replace,
`.damaged` one that failed verification. The folder itself may be a link, to a scratch disk for example, and
stays one. A checkpoint may be a link too, made by hand: it is read like any other; removing or replacing it
unlinks it and leaves its target alone.

Ownership: each run has a random id, stored in a mark (`run_id.json`) in the run folder and in every other folder
where it keeps checkpoints. A name does not identify a run, since under two values of `run.root` there may be two
of the same name and `checkpoint.remote` has one folder for both. So each run marks what is its own and never
continues from anything that another run has marked.
"""

import logging
import os
import re
import secrets
import shlex
import shutil
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NoReturn

from torch.distributed import ProcessGroup

from tide_mega.checkpoint.agreement import from_first, gather, is_first, rank_and_size
from tide_mega.checkpoint.state import SavedState
from tide_mega.checkpoint.storage import STATE_FILE, FileRecord, Manifest
from tide_mega.errors import CheckpointError, ConfigError
from tide_mega.files import is_same_place, read_json, to_disk, write_json
from tide_mega.jobs.slurm import SlurmJob

log = logging.getLogger(__name__)

PARTIAL, REPLACED, DAMAGED = ".partial", ".replaced", ".damaged"
COMPLETE = re.compile(rf"step-(\d+)({re.escape(REPLACED)})?")
_LEFTOVER = re.compile(rf"{COMPLETE.pattern}{re.escape(PARTIAL)}")

MARK_FILE = "run_id.json"
CHECKPOINTS = "checkpoints"
"""Name of the folder of checkpoints in a run folder."""


@dataclass(frozen=True)
class CheckpointFolder:
    """Checkpoints of one run in one folder; only one process writes to it."""

    path: Path

    def complete(self) -> list[Path]:
        """Return the folders named like a complete checkpoint, oldest first."""
        found = [path for path in self.path.glob("step-*") if COMPLETE.fullmatch(path.name) and _is_dir(path)]
        return sorted(found, key=lambda path: (step_of(path), not path.name.endswith(REPLACED)))

    def final(self, step: int) -> Path:
        """Return the folder of a complete checkpoint."""
        return self.path / f"step-{step:08d}"

    def partial(self, step: int) -> Path:
        """Return the folder in which a checkpoint is written."""
        return self.path / f"step-{step:08d}{PARTIAL}"

    def prepare(self, step: int) -> None:
        """Create an empty folder to write in, and remove what killed saves left."""
        self.path.resolve().mkdir(parents=True, exist_ok=True)  # resolved: the target of a link may be gone
        for leftover in [path for path in self.path.iterdir() if _LEFTOVER.fullmatch(path.name)]:
            _remove(leftover)
        for replaced in self.path.glob(f"step-*{REPLACED}"):
            if COMPLETE.fullmatch(replaced.stem) and _is_dir(replaced.with_suffix("")):
                _remove(replaced)
        partial = self.partial(step)
        partial.mkdir(
            exist_ok=not partial.is_symlink()
        )  # a link that could not be removed must not be followed

    def commit(self, step: int, save_id: str, state: str, files: dict[str, FileRecord]) -> None:
        """Complete what was written in `partial(step)`: write state, then manifest, then rename.

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
        """Remove the files of a failed save."""
        partial = self.partial(step)
        if partial.is_symlink():
            _remove(partial)
        else:
            shutil.rmtree(partial, ignore_errors=True)

    def retain(
        self, keep_last: int, keep_every: int | None, newest: int, in_use: Collection[int] = ()
    ) -> None:
        """Remove all checkpoints but the last ones, milestones, and those at multiples of `keep_every` steps.

        `newest`, the step just saved, always stays, and so do the steps `in_use`.
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
                # Rename first: half a checkpoint must not keep the name of a whole one.
                old.rename(out_of_sight)
            except OSError as error:
                log.warning("%s could not be removed (%s); it stays", old, error)
            else:
                _remove(out_of_sight)

    def mark_damaged(self, path: Path) -> Path | None:
        """Rename a checkpoint that failed verification; return None if the folder cannot be written."""
        try:
            return path.rename(_free_name(path.with_name(path.name + DAMAGED)))
        except OSError:
            return None

    def set_aside(self) -> Path | None:
        """Move the checkpoints, if any, to a new folder beside this one and return it.

        If this folder is a link, the new one lies beside its target. Other files, such as a run's mark, stay. The
        newest checkpoint is moved first, so that a start killed here leaves none that is newer than one already
        moved.
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
    except OSError:  # a link whose target may not be accessed
        return False


def _free_name(path: Path) -> Path:
    """Return `path` with the first free number appended; a broken link counts as taken."""
    number = 1
    while os.path.lexists(target := path.with_name(f"{path.name}-{number}")):
        number += 1
    return target


def _remove(path: Path) -> None:
    """Remove a folder or link; failure (a file open elsewhere, over NFS) is ignored and must not stop a save."""
    try:
        if not path.is_symlink() and path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        log.warning("%s could not be removed whole (%s); what is left is in nobody's way", path, error)


def step_of(path: Path) -> int:
    """Return the step in a complete checkpoint's name."""
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


@dataclass
class Search:
    """The result of a search for a whole checkpoint."""

    found: Path | None
    skipped: dict[Path, list[str]] = field(default_factory=dict)
    """Newer checkpoints, and what is wrong with each."""


def newest_valid(
    folders: list[CheckpointFolder], group: ProcessGroup | None = None, before: int | None = None
) -> Search:
    """Verify checkpoints, newest first, until one is whole; collective, with the same result on every rank.

    Of two of the same step, the one in the earlier folder is preferred; with `before`, only those of fewer steps
    count.

    Raises:
        CheckpointError: there are checkpoints, but all of them are damaged.
    """
    candidates = from_first(group, lambda: _newest_first(folders, before))
    search = Search(None)
    for path in candidates:
        problems = verify(path, group)
        if not problems:
            search.found = path
            return search
        search.skipped[path] = problems
        if is_first(group):
            log.warning("skipped %s: %s", path, "; ".join(problems))
    if search.skipped:
        listed = "; ".join(f"{path}: {', '.join(said)}" for path, said in search.skipped.items())
        raise CheckpointError(
            f"every checkpoint of this run is damaged, and a start from scratch would hide that ({listed}): "
            "restore one, or start anew with checkpoint.resume=false."
        )
    return search


def verify(path: Path, group: ProcessGroup | None = None) -> list[str]:
    """Return what is wrong with a checkpoint, empty if whole; collective: each rank reads some of the files."""
    manifest, problems = from_first(group, lambda: _look_at(path))
    if manifest is None or problems:
        return problems
    rank, size = rank_and_size(group)
    by_size = sorted(manifest.files, key=lambda name: (-manifest.files[name].size, name))
    mine = manifest.problems_inside(path, by_size[rank::size])
    return sorted(problem for of_rank in gather(group, mine) for problem in of_rank)


def _newest_first(folders: list[CheckpointFolder], before: int | None) -> list[Path]:
    found = [
        (step_of(path), not path.name.endswith(REPLACED), -rank_and_size, path)
        for rank_and_size, folder in enumerate(folders)
        for path in folder.complete()
        if before is None or step_of(path) < before
    ]
    return [path for *_, path in sorted(found, reverse=True)]


def _look_at(path: Path) -> tuple[Manifest | None, list[str]]:
    try:
        manifest = Manifest.read(path)
        problems = manifest.problems_outside(path)
        if manifest.step != step_of(path):
            problems.append(f"its manifest is of step {manifest.step}")
        return manifest, problems
    except (CheckpointError, OSError) as error:
        return None, [str(error)]


@dataclass(frozen=True)
class Mark:
    """The content of run_id.json."""

    id: str
    """Random, made at the run's first start."""
    folder: str
    """The run folder, absolute, at the latest start."""
    job: str | None = None
    """SLURM job id of the latest start."""

    @classmethod
    def read(cls, folder: Path) -> "Mark | None":
        """Return a folder's mark; None if it has none.

        Raises:
            ConfigError: run_id.json is not a valid mark.
        """
        path = folder / MARK_FILE
        try:
            content = read_json(folder, MARK_FILE)
            mark = cls(**content)
            if not (isinstance(mark.id, str) and mark.id and isinstance(mark.folder, str)):
                raise ValueError("it names no run")
            return mark
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"{path} cannot be read ({error}), so whose checkpoints are there is not known: bring it back, "
                "or remove it if they are this run's."
            ) from error


def other_places(folder: Path, remote: Path | None) -> list[Path]:
    """Return where the run in `folder` keeps checkpoints outside it: a linked folder and the remote folder."""
    checkpoints = folder / CHECKPOINTS
    places = [checkpoints] if checkpoints.is_symlink() else []
    if remote is not None and not is_same_place(remote, folder):
        places.append(remote)
    return places


def check_owner(folder: Path, places: Iterable[Path]) -> str:
    """Return the id of the run in `folder`, or a new one if it has none; reads only marks and manifests.

    Unmarked folders (from before marks existed) are identified by their content: a remote folder is the run's if
    one of its checkpoints is in the run folder too; a link to checkpoints was made by whoever made the run
    folder.

    Raises:
        ConfigError: one of `places` holds checkpoints of another or an unknown run.
    """
    mine = Mark.read(folder)
    for place in places:
        theirs = _mark_of(place)
        if theirs is None:
            if place != folder / CHECKPOINTS:
                _check_unmarked(folder, place)
        elif mine is None and _is_requeued(theirs, folder):
            log.warning("%s is begun again: this job's earlier start kept checkpoints in %s", folder, place)
            mine = theirs
        elif mine is None or mine.id != theirs.id:
            _refuse(folder, place, theirs, is_new=mine is None)
    return secrets.token_hex(16) if mine is None else mine.id


def claim_places(folder: Path, places: Iterable[Path]) -> None:
    """Mark the run folder and `places` with the run's id, after `check_owner`.

    Raises:
        ConfigError: as in `check_owner`, before anything is written; or the run folder cannot be written.
    """
    places = list(places)
    job = SlurmJob.from_environment()
    mark = Mark(check_owner(folder, places), str(folder.resolve()), None if job is None else job.id)
    for place in (folder, *places):
        if Mark.read(place) == mark:
            continue
        try:
            place.resolve().mkdir(parents=True, exist_ok=True)
            write_json(place / MARK_FILE, asdict(mark))
        except OSError as error:
            why = error.strerror or error
            if place == folder:
                raise ConfigError(
                    f"{place / MARK_FILE} cannot be written ({why}): make room, or give another run.root."
                ) from error
            log.warning("%s cannot be marked as this run's (%s)", place, why)


def keep_mark(folder: Path, place: Path) -> None:
    """Check, before a save changes `place`, that it still belongs to the run; a new folder there is marked.

    Raises:
        CheckpointError: it belongs to another run.
    """
    try:
        if Mark.read(folder) is not None:
            claim_places(folder, [place])
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def _mark_of(place: Path) -> Mark | None:
    """Return the mark of a folder of checkpoints: its own, or that of the run folder that contains it."""
    own, there = Mark.read(place), place.resolve()
    return Mark.read(there.parent) if own is None and there.name == CHECKPOINTS else own


def _is_requeued(mark: Mark, folder: Path) -> bool:
    """Return whether this is a later start of the marking job, whose run folder was on a node-local disk."""
    job = SlurmJob.from_environment()
    return job is not None and job.restarts > 0 and job.id == mark.job and is_same_place(mark.folder, folder)


def _check_unmarked(folder: Path, place: Path) -> None:
    theirs = CheckpointFolder(place).complete()
    if not theirs:
        return
    mine = {_save_id(path) for path in CheckpointFolder(folder / CHECKPOINTS).complete()} - {None}
    if any(_save_id(path) in mine for path in theirs):
        return
    here = shlex.quote(str(folder / CHECKPOINTS))
    raise ConfigError(
        f"{place} holds checkpoints that do not say of which run they are, and none of them is in "
        f"{folder / CHECKPOINTS}: give another checkpoint.remote or run.name, or move them away. If they are this "
        f"run's: mkdir -p {here} && cp -r {shlex.quote(str(theirs[-1]))} {here}/"
    )


def _save_id(path: Path) -> str | None:
    try:
        return Manifest.read(path).save_id
    except CheckpointError:
        return None


def _refuse(folder: Path, place: Path, theirs: Mark, *, is_new: bool) -> NoReturn:
    lost = (
        " If that run's folder is lost and this start is to go on from there: "
        f"cp {shlex.quote(str(place / MARK_FILE))} {shlex.quote(str(folder))}/"
    )
    raise ConfigError(
        f"{place} holds checkpoints of another run, which was last at work in {theirs.folder} "
        f"(id {theirs.id}), and not of the one in {folder}: give another checkpoint.remote or run.name."
        f"{lost if is_new else ''}"
    )
