"""The run folder `run.root/run.name`: configuration, environment, history of starts, metrics and checkpoints.

environment.json lists every start: when, in which SLURM job, with which code and configuration.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tide_mega.checkpoint.folder import CHECKPOINTS, check_owner, claim_places, other_places
from tide_mega.config.help import keyed
from tide_mega.config.hydra_door import from_yaml, to_yaml
from tide_mega.config.schema import TideConfig
from tide_mega.data.index import DatasetIndex
from tide_mega.errors import ConfigError, DataError, StatedError
from tide_mega.files import is_same_place, parse_json, write_bytes, write_json
from tide_mega.jobs.lock import FolderLock
from tide_mega.jobs.slurm import SlurmJob
from tide_mega.parallel.groups import make_host_group
from tide_mega.run.code import keep_code
from tide_mega.run.course import Course, Position
from tide_mega.run.environment import describe_environment

log = logging.getLogger(__name__)

_FIXED_SECTIONS = ("model", "memory", "data", "optim")
"""Sections of the configuration that must stay the same over all starts of a run."""
_WANDB_ID, _FINISHED = "wandb_run_id", "finished.json"


def add_start(
    path: Path,
    environment: dict[str, Any],
    *,
    code: str | None,
    config: str,
    job: SlurmJob | None,
    data: str | None = None,
) -> int:
    """Write environment.json: what this start runs on, and `starts`, with one entry per start so far.

    Args:
        path: environment.json.
        environment: what this start runs on.
        code: id of the copy of the code (`code/<id>.tar.gz`); None if there is none.
        config: file in the run folder with this start's configuration.
        job: the SLURM job, if any.
        data: fingerprint of the dataset; None if there is none yet.

    Returns:
        The number of starts so far, this one included.
    """
    start = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "job": job.id if job else None,
        "restart": job.restarts if job else None,
        "nodes": job.nodes if job else None,
        "world_size": environment["world_size"],
        "git": environment["git"],
        "code": code,
        "config": config,
        "data": data,
    }
    starts = [*read_starts(path), start]
    content = json.dumps(environment | {"starts": starts}, indent=2)
    write_bytes(path, content.encode() + b"\n")
    return len(starts)


def read_starts(path: Path) -> list[dict[str, Any]]:
    """Return the starts listed in environment.json, oldest first; empty if there is no such file."""
    if not path.exists():
        return []
    try:
        return list(parse_json(path.read_text(encoding="utf-8"))["starts"])
    except (ValueError, KeyError, TypeError):
        log.warning("%s does not list the starts before this one: its list begins anew", path)
        return []


def keep_config(folder: Path, text: str, run_folder: Path) -> str:
    """Write a start's configuration to `folder`, unless an earlier start had the same; return its path in the run.

    Files are numbered in order of their first use.
    """
    content = text.encode()
    known = sorted(folder.glob("config-*.yaml"))
    for path in reversed(known):
        if path.read_bytes() == content:
            return path.relative_to(run_folder).as_posix()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"config-{len(known) + 1:04d}.yaml"
    write_bytes(path, content)
    return path.relative_to(run_folder).as_posix()


_FREE_KEYS = frozenset(
    {
        *("data.num_workers", "data.verify", "data.on_bad_shard"),
        *("data.perplexity_texts", "data.perplexity_tokens", "data.max_document_bytes"),
        "optim.reschedule",
        *("memory.owners", "memory.window", "memory.exchange_ahead"),
    }
)
"""Keys in these sections that do not affect what is trained."""
_PATHS = frozenset({"data.path", "data.perplexity_texts", "checkpoint.remote"})
"""Keys whose paths may be spelled differently at each start."""


@dataclass(frozen=True)
class RunFolder:
    """Paths in a run folder."""

    path: Path

    @classmethod
    def of(cls, config: TideConfig) -> "RunFolder":
        """Return the run folder of a configuration."""
        return cls(Path(config.run.root) / config.run.name)

    @property
    def config(self) -> Path:
        """The resolved configuration of the latest start."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """Versions, git state, device and number of processes of the latest start; and the list of all starts."""
        return self.path / "environment.json"

    @property
    def code(self) -> Path:
        """Folder with the code of every start (`tide_mega.run.code`)."""
        return self.path / "code"

    @property
    def metrics(self) -> Path:
        """Metrics, one record per line (`tide_mega.metrics.jsonl`)."""
        return self.path / "metrics.jsonl"

    @property
    def goodput(self) -> Path:
        """Wall time by category over all starts (`tide_mega.training.goodput`)."""
        return self.path / "goodput.json"

    @property
    def summary(self) -> Path:
        """How the run went, written at the end of each process (`tide_mega.training.report`)."""
        return self.path / "summary.json"

    @property
    def hangs(self) -> Path:
        """Python stacks of ranks that made no progress (`tide_mega.training.faults.watchdog`)."""
        return self.path / "hangs"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / CHECKPOINTS

    def read_wandb_id(self) -> str | None:
        """Return the id of the run's W&B run; None if there is none yet."""
        path = self.path / _WANDB_ID
        return path.read_text(encoding="utf-8", errors="replace").strip() or None if path.exists() else None

    def write_wandb_id(self, run_id: str | None) -> None:
        """Store the id of the W&B run, so that a start without a checkpoint also continues it."""
        if run_id is not None and run_id != self.read_wandb_id():
            write_bytes(self.path / _WANDB_ID, run_id.encode() + b"\n")

    @property
    def origin(self) -> Path:
        """Origin of a branch (`tide_mega.training.outset`)."""
        return self.path / "origin.json"

    def finish(self) -> "Finish | None":
        """Return the position at which the run ended as planned; None if it has not."""
        path = self.path / _FINISHED
        if not path.exists():
            return None
        try:
            kept = parse_json(path.read_text(encoding="utf-8"))
            return Finish(int(kept["steps"]), int(kept.get("tokens", 0)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("%s is damaged (%s): the run counts as unfinished", path, error)
            return None

    def mark_finished(self, at: Position) -> None:
        """Record that the run ended as planned at this position."""
        write_json(self.path / _FINISHED, {"steps": at.step, "tokens": at.tokens})

    def mark_unfinished(self) -> None:
        """Record that the run continues."""
        (self.path / _FINISHED).unlink(missing_ok=True)


@dataclass(frozen=True)
class Finish:
    """The position at which a run ended as planned."""

    step: int
    tokens: int
    """0 if it was not recorded."""


def finished_run(config: TideConfig, course: Course) -> RunFolder | None:
    """Return the run's folder, and log that there is nothing to do, if the run is complete.

    Returns None if there is something to train, or `checkpoint.resume=false` asks for a new start.

    Raises:
        ConfigError: the folder holds a run with another model, memory, data or optim section.
    """
    folder = RunFolder.of(config)
    finish = folder.finish()
    if not config.checkpoint.resume or finish is None or not course.is_complete(finish):
        return None
    _check_same_run(folder, read_config(folder), config)
    log.info("%s is complete: %d steps done, nothing to train", folder.path, finish.step)
    return folder


@contextmanager
def held(config: TideConfig, *, writes: bool) -> Iterator[None]:
    """Lock the run folder and the remote folder of its checkpoints against other processes and runs; collective.

    The rank that `writes` (rank 0) takes the locks before anything in the folders is used, moved or removed.

    Raises:
        FolderTakenError: another process is using a folder; raised on every rank.
        ConfigError: a folder cannot be written, or the checkpoints are another run's; raised on every rank.
    """
    group = make_host_group(config.cluster.timeout_minutes)
    with ExitStack() as stack:
        problem: StatedError | None = None
        if writes:
            try:
                _hold(config, stack)
            except StatedError as error:
                problem = error
        box = [problem]
        dist.broadcast_object_list(box, src=0, group=group)
        dist.destroy_process_group(group)
        if box[0] is not None:
            raise box[0]
        yield


def remote_folder(config: TideConfig) -> Path | None:
    """Return the folder that receives copies of the run's checkpoints; None if there is none."""
    remote = config.checkpoint.remote
    return None if remote is None else Path(remote) / config.run.name


def _hold(config: TideConfig, stack: ExitStack) -> None:
    local = RunFolder.of(config).path
    stack.enter_context(FolderLock(local, "a training", key="run.root/run.name"))
    remote = remote_folder(config)
    places = other_places(local, remote)
    check_owner(local, places)
    if remote in places:
        try:
            stack.enter_context(FolderLock(remote, "a training", key="checkpoint.remote"))
        except ConfigError as error:
            log.warning("%s Copies of checkpoints may fail (checkpoint.on_error)", error)
    claim_places(local, places)


def open_run_folder(config: TideConfig, *, world_size: int, device: torch.device, writes: bool) -> RunFolder:
    """Create the run folder, or reopen it for the same run.

    Called on every rank, each of which checks; the rank that `writes` (rank 0) writes config.yaml, the code, and
    the entry of this start in environment.json.

    Raises:
        ConfigError: the folder holds a run with another model, memory, data or optim section.
    """
    folder = RunFolder.of(config)
    if folder.config.exists():
        _check_same_run(folder, read_config(folder), config)
    if writes:
        folder.path.mkdir(parents=True, exist_ok=True)
        _note_start(folder, config, describe_environment(device, world_size))
    return folder


def _note_start(folder: RunFolder, config: TideConfig, environment: dict[str, Any]) -> None:
    text = to_yaml(config)
    job = SlurmJob.from_environment()
    number = add_start(
        folder.environment,
        environment,
        code=keep_code(folder.code),
        config=keep_config(folder.path / "starts", text, folder.path),
        job=job,
        data=_data_fingerprint(config),
    )
    write_bytes(folder.config, text.encode())
    in_job = f", job {job.id}, restart {job.restarts}" if job else ""
    log.info("%s: start %d%s", folder.path, number, in_job)


def read_config(folder: RunFolder) -> TideConfig:
    """Return the configuration of the folder's latest start.

    Raises:
        ConfigError: it is not a configuration of this version.
    """
    try:
        return from_yaml(folder.config.read_text(encoding="utf-8"))
    except (ConfigError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{folder.config} is not a configuration of this version ({error}): "
            "choose another run.name, or move that folder away."
        ) from error


def _check_same_run(folder: RunFolder, before: TideConfig, now: TideConfig) -> None:
    fixed, free = [], []
    for key, old, new in differences(keyed(before), keyed(now)):
        if key in _PATHS and is_same_place(old, new):
            continue
        if key == "data.path" and _is_its_data(folder, now):
            log.info("data.path: reading %s; the last start looked in %s", new, old)
            continue
        section = key.split(".")[0]
        change = f"{key} (there {old!r}, now {new!r})"
        if section in _FIXED_SECTIONS and key not in _FREE_KEYS:
            fixed.append(change)
        elif section != "run":
            free.append(change)
    if fixed:
        more = f" and {len(fixed) - 3} more" if len(fixed) > 3 else ""
        is_same_model = not any(change.startswith(("model.", "memory.")) for change in fixed)
        branch = f" (run.from={folder.path} would go on from this run there)" if is_same_model else ""
        raise ConfigError(
            f"run.name={now.run.name!r} is taken: {folder.path} holds a run with another "
            f"{', '.join(fixed[:3])}{more}; choose another run.name{branch}, or give it the values it had."
        )
    if free:
        log.warning(
            "%s was started with another %s; going on with the new values", folder.path, ", ".join(free)
        )


def _is_its_data(folder: RunFolder, now: TideConfig) -> bool:
    """Return whether `data.path` holds the dataset that the run was trained on, as far as that is known.

    Starts that found no data trained on none and do not count; missing data is reported when it is opened.
    """
    there, starts = _data_fingerprint(now), read_starts(folder.environment)
    known = [start["data"] for start in starts if start.get("data")]
    if there is None or known:
        return there in (None, *known[-1:])
    return bool(starts) and all("data" in start for start in starts)


def _data_fingerprint(config: TideConfig) -> str | None:
    try:
        return DatasetIndex.load(config.data.path).fingerprint
    except DataError:
        return None


def differences(
    before: dict[str, Any], now: dict[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Yield each key that differs between two configurations (`tide_mega.config.help.keyed`), with both values."""
    for name in before:
        key, old, new = prefix + name, before[name], now[name]
        if isinstance(old, dict) and isinstance(new, dict):
            yield from differences(old, new, key + ".")
        elif old != new:
            yield key, old, new
