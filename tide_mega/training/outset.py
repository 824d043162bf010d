"""Resolves where a start of a run begins: its own newest checkpoint, a branch of another run, or step 0.

A start resumes from the run's newest checkpoint. Without one it begins at step 0 or, with `run.from`, as a branch:
with the weights, moments and counts of another run's checkpoint. The origin of a branch is kept in its
checkpoints, in `origin.json` of its folder and in W&B's configuration. A branch that is restarted before its first
checkpoint branches again, at the step that origin.json names. The learning-rate schedule is settled here too: the
run's own, unless the configuration asks for a new one.
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tide_mega.checkpoint import Checkpointer, CheckpointError, TrainingState
from tide_mega.checkpoint.folder import CheckpointFolder, step_of
from tide_mega.checkpoint.state import SavedState, check_model, model_sizes
from tide_mega.config.help import keyed
from tide_mega.config.schema import TideConfig
from tide_mega.config.validate import parent_of
from tide_mega.errors import ConfigError, refuse
from tide_mega.files import parse_json, write_json
from tide_mega.run.course import Course, Position
from tide_mega.run.folder import RunFolder, differences, read_config, remote_folder
from tide_mega.training.optimizer import Schedule

log = logging.getLogger(__name__)

ORIGIN, SCHEDULE = "origin", "schedule"
"""Keys under which checkpoints keep the origin of a branch, and the schedule."""
_COMPARED = ("memory", "data", "optim", "trainer")


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a branch started from."""

    run: str
    """Folder of the parent run, as given in `run.from`."""
    path: str
    """Absolute path of its checkpoint."""
    save_id: str
    step: int
    tokens: int
    samples: int
    """Sequences that the parent had consumed of its data."""
    continues_data: bool
    """Whether the branch continues in the parent's data order; else it starts an order of its own."""
    rate: float
    """Learning rate that the parent's schedule gives its next update."""
    schedule: dict[str, Any]
    """The parent's schedule."""
    wandb_run_id: str | None

    @classmethod
    def of(cls, state: TrainingState) -> "Origin | None":
        """Return the origin of a branch; None for a run that began at step 0."""
        kept = state.extra.get(ORIGIN)
        return None if kept is None else cls(**kept)


@dataclass(frozen=True)
class Outset:
    """The state and schedule that a start of a run begins with."""

    state: TrainingState
    schedule: Schedule
    is_resumed: bool
    """Whether the state is from a checkpoint of the run itself."""


def check_outset(config: TideConfig, course: Course) -> None:
    """Check, before anything is loaded, that a run without checkpoints can begin.

    Raises:
        ConfigError: the schedule does not fit, or the parent run or its checkpoint does not exist.
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
        return  # reported when the checkpoint is verified
    check_model(model_sizes(config), saved.identity.model, at, "or branch from another run")
    was = saved.progress.count_tokens(read_config(RunFolder(path)).data.seq_length)
    if course.is_complete(was):
        refuse(
            course.key, course.total, f"is reached where the run branches, at {course.done(was)}", "give more"
        )
    _of_configuration(config, course, was, rate=0.0)


def set_out(config: TideConfig, course: Course, folder: RunFolder, checkpoints: Checkpointer) -> Outset:
    """Load the state that the run continues from, and settle its schedule; collective.

    Raises:
        CheckpointError: there are checkpoints, but none of those asked for is usable.
        ConfigError: they belong to another run, or a new schedule does not fit.
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
        if _is_logging_rank():
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
    if _is_logging_rank():
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
    """Return the schedule of a resumed run: its own, or the configuration's if that is asked for."""
    optim, kept, origin = config.optim, state.extra.get(SCHEDULE), Origin.of(state)
    rate = 0.0 if origin is None else origin.rate
    if kept is None:  # a checkpoint written before schedules were kept
        return _of_configuration(config, course, origin, rate)
    own = Schedule.from_json(kept)
    try:
        new = _of_configuration(config, course, origin, rate)
    except ConfigError as error:
        if optim.reschedule:
            raise
        if _is_logging_rank():
            log.warning("the run keeps its schedule (%s); another cannot be made: %s", own.describe(), error)
        return own
    if new != own and _is_logging_rank():
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
    """Return the configured schedule: of a run, or of a branch from `since`, where its parent has `rate`.

    Raises:
        ConfigError: warm-up and cooldown do not fit.
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
    """Return parent folder and step that a run without checkpoints branches from; None if it is no branch."""
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
    """Refuse to continue in the folder of another branch; compares names only, since folders may have moved."""
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


def _is_logging_rank() -> bool:
    return dist.get_rank() == 0
