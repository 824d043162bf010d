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
from tide_mega.data.atomic import write_bytes
from tide_mega.training.environment import describe_environment

log = logging.getLogger(__name__)

_FIXED_SECTIONS = ("model", "memory", "data", "optim")
"""Sections that a run keeps from its start to its end."""
_FREE_KEYS = frozenset({"data.num_workers", "data.verify"})
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
        """Versions, git state, device and number of processes of the latest start."""
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        """One record a line (`tide_mega.training.jsonl`)."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"


def open_run_folder(config: TideConfig, *, world_size: int, device: torch.device, writes: bool) -> RunFolder:
    """Create the run folder, or open it again for the same run.

    Every rank calls it and checks; the one that `writes` (rank 0) writes config.yaml and environment.json.

    Raises:
        ConfigError: if the folder holds a run with another model, memory, data or optim section.
    """
    folder = RunFolder(Path(config.run.root) / config.run.name)
    if folder.config.exists():
        _check_same_run(folder, read_config(folder), config)
    if writes:
        folder.path.mkdir(parents=True, exist_ok=True)
        write_bytes(folder.config, to_yaml(config).encode())
        environment = json.dumps(describe_environment(device, world_size), indent=2)
        write_bytes(folder.environment, environment.encode() + b"\n")
    return folder


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
