"""The run folder `run.root/run.name`: where a run's configuration, environment and metrics live."""

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tide_mega.config.errors import ConfigError
from tide_mega.config.hydra_door import from_yaml, to_yaml
from tide_mega.config.schema import TideConfig
from tide_mega.data.atomic import write_bytes, write_json
from tide_mega.training.code_snapshot import keep_code
from tide_mega.training.environment import describe_environment
from tide_mega.training.slurm_job import SlurmJob
from tide_mega.training.starts import add_start, keep_config

log = logging.getLogger(__name__)

_FIXED_SECTIONS = ("model", "memory", "data", "optim")
"""Sections that a run keeps from its start to its end."""
_WANDB_ID, _FINISHED = "wandb_run_id", "finished.json"
_FREE_KEYS = frozenset(
    {
        *("data.num_workers", "data.verify", "data.perplexity_texts", "data.perplexity_tokens"),
        *("memory.owners", "memory.window", "memory.exchange_ahead"),
    }
)
"""Keys in them that change nothing of what is trained."""


@dataclass(frozen=True)
class RunFolder:
    """Paths in a run folder."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration of the latest start."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """Versions, git state, device and number of processes of the latest start; the list of all starts."""
        return self.path / "environment.json"

    @property
    def code(self) -> Path:
        """Folder of the code of every start (`tide_mega.training.code_snapshot`)."""
        return self.path / "code"

    @property
    def metrics(self) -> Path:
        """One record a line (`tide_mega.metrics.jsonl`)."""
        return self.path / "metrics.jsonl"

    @property
    def goodput(self) -> Path:
        """Wall time by category over all starts (`tide_mega.training.goodput`)."""
        return self.path / "goodput.json"

    @property
    def summary(self) -> Path:
        """How the run went, written at the end of each process (`tide_mega.training.summary`)."""
        return self.path / "summary.json"

    @property
    def hangs(self) -> Path:
        """Python stacks of ranks that made no progress (`tide_mega.training.faults.watchdog`)."""
        return self.path / "hangs"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    def read_wandb_id(self) -> str | None:
        """Return the identity of the run's W&B run, None where there is none yet."""
        path = self.path / _WANDB_ID
        return path.read_text(encoding="utf-8").strip() or None if path.exists() else None

    def write_wandb_id(self, run_id: str | None) -> None:
        """Keep the identity of the W&B run, so that a start without a checkpoint continues it too."""
        if run_id is not None and run_id != self.read_wandb_id():
            write_bytes(self.path / _WANDB_ID, run_id.encode() + b"\n")

    def finished_steps(self) -> int:
        """Return the steps after which the run ended as planned; 0 where it has not."""
        path = self.path / _FINISHED
        return int(json.loads(path.read_text(encoding="utf-8"))["steps"]) if path.exists() else 0

    def mark_finished(self, steps: int) -> None:
        """Note that the run ended as planned, after `steps`."""
        write_json(self.path / _FINISHED, {"steps": steps})

    def mark_unfinished(self) -> None:
        """Note that the run goes on."""
        (self.path / _FINISHED).unlink(missing_ok=True)


def finished_run(config: TideConfig, steps: int) -> RunFolder | None:
    """Return the run's folder if it has ended as planned after `steps` or more; log that there is nothing to do.

    None where there is something to train, and where `checkpoint.resume=false` asks for a new start.

    Raises:
        ConfigError: if the folder holds a run with another model, memory, data or optim section.
    """
    folder = RunFolder(Path(config.run.root) / config.run.name)
    done = folder.finished_steps()
    if not config.checkpoint.resume or done < max(1, steps):
        return None
    _check_same_run(folder, read_config(folder), config)
    log.info("%s is complete: %d steps done, nothing to train", folder.path, done)
    return folder


def open_run_folder(config: TideConfig, *, world_size: int, device: torch.device, writes: bool) -> RunFolder:
    """Create the run folder, or open it again for the same run.

    Every rank calls it and checks; the one that `writes` (rank 0) writes config.yaml, the code, and the start into
    environment.json.

    Raises:
        ConfigError: if the folder holds a run with another model, memory, data or optim section.
    """
    folder = RunFolder(Path(config.run.root) / config.run.name)
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
    )
    write_bytes(folder.config, text.encode())
    in_job = f", job {job.id}, restart {job.restarts}" if job else ""
    log.info("%s: start %d%s", folder.path, number, in_job)


def read_config(folder: RunFolder) -> TideConfig:
    """Return the configuration of the folder's latest start.

    Raises:
        ConfigError: it is not one of this version.
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
    for key, old, new in _differences(asdict(before), asdict(now)):
        section = key.split(".")[0]
        change = f"{key} (there {old!r}, now {new!r})"
        if section in _FIXED_SECTIONS and key not in _FREE_KEYS:
            fixed.append(change)
        elif section != "run":
            free.append(change)
    if fixed:
        more = f" and {len(fixed) - 3} more" if len(fixed) > 3 else ""
        raise ConfigError(
            f"run.name={now.run.name!r} is taken: {folder.path} holds a run with another "
            f"{', '.join(fixed[:3])}{more}; choose another run.name, or give it the values it had."
        )
    if free:
        log.warning(
            "%s was started with another %s; going on with the new values", folder.path, ", ".join(free)
        )


def _differences(
    before: dict[str, Any], now: dict[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    for name in before:
        key, old, new = prefix + name, before[name], now[name]
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, key + ".")
        elif old != new:
            yield key, old, new
