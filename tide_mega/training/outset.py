"""Where a start of a run stands, and which schedule it follows.

It goes on from the run's newest checkpoint; without one it begins, at nothing or (`run.from`) as a branch: with
the weights, moments and counts of another run's checkpoint. What a branch came from is kept in its checkpoints,
in `origin.json` of its folder and in W&B's configuration. A start before the first checkpoint of its own
branches again, at the step that origin.json names.
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tide_mega.checkpoint import Checkpointer, CheckpointError, TrainingState
from tide_mega.checkpoint.folder import CheckpointFolder, step_of
from tide_mega.checkpoint.state import SavedState, check_model, model_sizes
from tide_mega.config.describe import keyed
from tide_mega.config.errors import ConfigError, refuse
from tide_mega.config.schema import TideConfig
from tide_mega.config.stored import parse_json
from tide_mega.config.validate import parent_of
from tide_mega.data.atomic import write_json
from tide_mega.training.course import Course, Position
from tide_mega.training.runfolder import RunFolder, differences, read_config, remote_folder
from tide_mega.training.schedule import Schedule

log = logging.getLogger(__name__)

ORIGIN, SCHEDULE = "origin", "schedule"
"""Names under which checkpoints keep what a branch came from, and the schedule."""
_COMPARED = ("memory", "data", "optim", "trainer")


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a branch came from."""

    run: str
    """Folder of the parent run, as `run.from` named it."""
    path: str
    """Its checkpoint's folder, absolute."""
    save_id: str
    step: int
    tokens: int
    samples: int
    """Sequences of the parent's data that it had consumed."""
    continues_data: bool
    """Whether the branch goes on in the parent's order; else its own order begins anew."""
    rate: float
    """What the parent's schedule has for its next update."""
    schedule: dict[str, Any]
    """The parent's."""
    wandb_run_id: str | None

    @classmethod
    def of(cls, state: TrainingState) -> "Origin | None":
        """Return what a run came from; None where it began at nothing."""
        kept = state.extra.get(ORIGIN)
        return None if kept is None else cls(**kept)


@dataclass(frozen=True)
class Outset:
    """Where a start stands."""

    state: TrainingState
    schedule: Schedule
    is_resumed: bool
    """Whether from a checkpoint of the run's own."""


def check_outset(config: TideConfig, course: Course) -> None:
    """Refuse, before anything is loaded, what a run without checkpoints could not begin with.

    Raises:
        ConfigError: the schedule does not fit, or the parent or its checkpoint is not there.
    """
    folder = RunFolder.of(config)
    if config.checkpoint.resume and _has_checkpoints(config, folder):
        return
    parent = _parent(config, folder)
    if parent is None:
        Schedule.of(config.optim, course)
        return
    path, step = parent
    asked = config.run.from_ or f"{path}@{step}"
    if path.resolve() == folder.path.resolve():
        refuse("run.from", asked, "is the run itself", "give the branch a run.name of its own")
    if not RunFolder(path).config.exists():
        why = f"names no run: there is no {RunFolder(path).config}"
        refuse("run.from", asked, why, "give <run folder>@<step>")
    complete = {step_of(one): one for one in CheckpointFolder(RunFolder(path).checkpoints).complete()}
    if not complete:
        why = f"branches from a run without checkpoints, {path}"
        refuse("run.from", asked, why, "wait for its first, or give another run")
    if step is not None and step not in complete:
        listed = ", ".join(map(str, sorted(complete)[-10:]))
        why = f"asks for step {step}, of which {path} has no checkpoint"
        refuse("run.from", asked, why, f"use {'one of ' if len(complete) > 1 else ''}{listed}")
    at = complete[max(complete) if step is None else step]
    try:
        saved = SavedState.read(at)
    except CheckpointError:
        return  # what is wrong with it is said when it is verified
    check_model(model_sizes(config), saved.identity.model, at, "or branch from another run")
    was = saved.progress.count_tokens(read_config(RunFolder(path)).data.seq_length)
    if course.is_complete(was):
        refuse(
            course.key, course.total, f"is reached where the run branches, at {course.done(was)}", "give more"
        )
    _of_configuration(config, course, was, rate=0.0)


def set_out(config: TideConfig, course: Course, folder: RunFolder, checkpoints: Checkpointer) -> Outset:
    """Load what the run goes on from, and settle its schedule; collective.

    Raises:
        CheckpointError: there are checkpoints, and none that is asked for can be used.
        ConfigError: they are of another run, or a new schedule does not fit.
    """
    state = checkpoints.resume()
    is_resumed = state is not None
    if state is not None:
        state.count_tokens(config.data.seq_length)
        _check_origin(config, folder, Origin.of(state))
        schedule = _settle(config, course, state)
    elif (parent := _parent(config, folder)) is not None:
        state, schedule = _branch(config, course, folder, checkpoints, *parent)
    else:
        state, schedule = TrainingState(), Schedule.of(config.optim, course)
        if _speaks():
            folder.origin.unlink(missing_ok=True)
            log.info("learning rate: %s", schedule.describe())
    return Outset(state, schedule, is_resumed)


def _branch(
    config: TideConfig,
    course: Course,
    folder: RunFolder,
    checkpoints: Checkpointer,
    parent: Path,
    step: int | None,
) -> tuple[TrainingState, Schedule]:
    check_outset(config, course)
    before = read_config(RunFolder(parent))
    path, saved = checkpoints.adopt(RunFolder(parent).checkpoints, step)
    was = saved.progress.count_tokens(before.data.seq_length)
    kept = was.extra.get(SCHEDULE)
    old = Schedule.of(before.optim, Course.of(before)) if kept is None else Schedule.from_json(kept)
    continues = saved.identity.data == checkpoints.identity.data and before.data.seed == config.data.seed
    origin = Origin(
        run=str(parent),
        path=str(path.resolve()),
        save_id=saved.save_id,
        step=was.step,
        tokens=was.tokens,
        samples=was.samples,
        continues_data=continues,
        rate=old.rate(was),
        schedule=old.to_json(),
        wandb_run_id=was.wandb_run_id,
    )
    state = TrainingState(
        step=was.step,
        samples=was.samples if continues else 0,
        extra={ORIGIN: asdict(origin)},
        tokens=was.tokens,
        consumed_tokens=was.consumed_tokens,
        batches=was.step,
    )
    schedule = _of_configuration(config, course, origin, origin.rate)
    if _speaks():
        _describe(config, before, origin, old, schedule)
        write_json(folder.origin, asdict(origin))
    return state, schedule


def _describe(config: TideConfig, before: TideConfig, origin: Origin, old: Schedule, new: Schedule) -> None:
    there, here = keyed(before), keyed(config)
    changed = [
        f"{key} (there {was!r}, here {now!r})"
        for section in _COMPARED
        for key, was, now in differences(there[section], here[section], f"{section}.")
    ]
    log.info(
        "branches from %s at step %d, after %s tokens; what differs: %s",
        origin.run,
        origin.step,
        f"{origin.tokens:,}",
        ", ".join(changed) or "nothing",
    )
    if origin.continues_data:
        log.info("data: the parent's in its order, which goes on after %s sequences", f"{origin.samples:,}")
    else:
        log.info("data: not the parent's, or in another order (data.seed): it begins anew")
    log.info(
        "learning rate of step %d: %.2e by the parent's schedule (%s), %.2e by the branch's own (%s)",
        origin.step + 1,
        origin.rate,
        old.describe(),
        new.rate(origin),
        new.describe(),
    )


def _settle(config: TideConfig, course: Course, state: TrainingState) -> Schedule:
    """Return the schedule that a resumed run follows: its own, or where that is asked for the configuration's."""
    optim, kept, origin = config.optim, state.extra.get(SCHEDULE), Origin.of(state)
    rate = 0.0 if origin is None else origin.rate
    if kept is None:  # a checkpoint of a first version
        return _of_configuration(config, course, origin, rate)
    own = Schedule.from_json(kept)
    try:
        new = _of_configuration(config, course, origin, rate)
    except ConfigError as error:
        if optim.reschedule:
            raise
        if _speaks():
            log.warning("the run keeps its schedule (%s); another cannot be made: %s", own.describe(), error)
        return own
    if new != own and _speaks():
        log.warning(
            "learning rate of step %d: %.2e by the run's schedule (%s), %.2e by that of %s (%s); %s",
            state.step + 1,
            own.rate(state),
            own.describe(),
            new.rate(state),
            f"{course.key}={course.total} in batches of {course.batch}",
            new.describe(),
            "it changes to the second (optim.reschedule=true)"
            if optim.reschedule
            else "it keeps the first; optim.reschedule=true would change to the second",
        )
    return new if optim.reschedule else own


def _of_configuration(config: TideConfig, course: Course, since: Position | None, rate: float) -> Schedule:
    """Make the schedule of a run from its beginning, or of a branch since a position where its parent has `rate`.

    Raises:
        ConfigError: its parts do not fit.
    """
    optim = config.optim
    if since is None:
        return Schedule.of(optim, course)
    if optim.rewarmup_steps:
        return Schedule.rewarmed(optim, course, since, rate)
    schedule = Schedule.of(optim, course)
    left = schedule.end - course.done(since)
    if schedule.cooldown and schedule.cooldown > left:
        most = left // course.whole
        why = f"is longer than what is left after the branch, {most} steps"
        refuse("optim.cooldown_steps", optim.cooldown_steps, why, f"use at most {most}, or train longer")
    return schedule


def _parent(config: TideConfig, folder: RunFolder) -> tuple[Path, int | None] | None:
    """Return the run folder and the step that a run without checkpoints branches from; None where from nothing."""
    asked = parent_of(config)
    if not config.checkpoint.resume or not folder.origin.exists():
        return asked
    try:
        origin = Origin(**parse_json(folder.origin.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{folder.origin} cannot be read ({error}): remove it, and give run.from again."
        ) from error
    _check_origin(config, folder, origin)
    return (Path(origin.path).parents[1] if asked is None else asked[0]), origin.step


def _check_origin(config: TideConfig, folder: RunFolder, origin: Origin | None) -> None:
    """Refuse to go on in the folder of another branch; folders may have moved, so their names are compared."""
    if (asked := parent_of(config)) is None:
        return
    path, step = asked
    if origin is None or Path(origin.run).name != path.name or step not in (None, origin.step):
        is_what = "no branch" if origin is None else f"a branch of {origin.run}@{origin.step}"
        raise ConfigError(
            f"run.from={config.run.from_} does not fit the run in {folder.path}, which is {is_what}: "
            "choose another run.name, or leave run.from out."
        )


def _has_checkpoints(config: TideConfig, folder: RunFolder) -> bool:
    places = (folder.checkpoints, remote_folder(config))
    return any(CheckpointFolder(place).complete() for place in places if place is not None)


def _speaks() -> bool:
    return dist.get_rank() == 0
