"""Whose a folder of checkpoints is: the run's random id, in the run folder and wherever else it keeps checkpoints.

A name tells no run from another: under two values of `run.root` there may be two of one name, and
`checkpoint.remote` has one folder for both. Each run therefore marks what is its own, and goes on with nothing
that another has marked.
"""

import logging
import secrets
import shlex
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from tide_mega.checkpoint.errors import CheckpointError
from tide_mega.checkpoint.folder import CheckpointFolder
from tide_mega.checkpoint.manifest import Manifest
from tide_mega.config.errors import ConfigError
from tide_mega.config.paths import is_same_place
from tide_mega.config.stored import read_json
from tide_mega.data.atomic import write_json
from tide_mega.jobs.slurm_job import SlurmJob

log = logging.getLogger(__name__)

MARK_FILE = "run_id.json"
CHECKPOINTS = "checkpoints"
"""The folder of checkpoints in a run folder."""


@dataclass(frozen=True)
class Mark:
    """The content of run_id.json."""

    id: str
    """Random, made at the run's first start."""
    folder: str
    """The run folder, absolute, at the latest start."""
    job: str | None = None
    """The SLURM job of the latest start."""

    @classmethod
    def read(cls, folder: Path) -> "Mark | None":
        """Return a folder's mark; None where there is none.

        Raises:
            ConfigError: there is something that is no mark.
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


def elsewhere(folder: Path, remote: Path | None) -> list[Path]:
    """Return where the run in `folder` keeps checkpoints outside of it: what is linked, and the remote folder."""
    checkpoints = folder / CHECKPOINTS
    places = [checkpoints] if checkpoints.is_symlink() else []
    if remote is not None and not is_same_place(remote, folder):
        places.append(remote)
    return places


def check(folder: Path, places: Iterable[Path]) -> str:
    """Return the id of the run in `folder`, a new one where it has none; reads marks and manifests alone.

    Folders from before there were marks are told by what they hold: a remote folder is the run's if one of its
    checkpoints lies in the run folder too; a link to checkpoints was made by whoever made the run folder.

    Raises:
        ConfigError: one of `places` holds checkpoints of another run, or of one that is not known.
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


def claim(folder: Path, places: Iterable[Path]) -> None:
    """Mark the run folder and `places` with the run's id, after `check`.

    Raises:
        ConfigError: as `check`, before anything is written; or the run folder cannot be written.
    """
    places = list(places)
    job = SlurmJob.from_environment()
    mark = Mark(check(folder, places), str(folder.resolve()), None if job is None else job.id)
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


def keep(folder: Path, place: Path) -> None:
    """See, before a save changes `place`, that it is still the run's; a folder that is new there is marked.

    Raises:
        CheckpointError: another run has it.
    """
    try:
        if Mark.read(folder) is not None:
            claim(folder, [place])
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def _mark_of(place: Path) -> Mark | None:
    """Return the mark of a folder of checkpoints: its own, or that of the run folder in which it lies."""
    own, there = Mark.read(place), place.resolve()
    return Mark.read(there.parent) if own is None and there.name == CHECKPOINTS else own


def _is_requeued(mark: Mark, folder: Path) -> bool:
    """Whether this is a later start of the job that made the mark; its run folder was on a node's own disk."""
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
