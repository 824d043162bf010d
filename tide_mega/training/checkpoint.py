"""Saving and resuming at the same topology, through DeepSpeed's own files.

A checkpoint is the folder `step-00000100` holding DeepSpeed's shards and `state.json`. It is written under
another name and renamed when every file is on disk, so a folder with that name is complete.
"""

import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from tide_mega.config.errors import ConfigError
from tide_mega.memory.owned import OwnedTables
from tide_mega.parallel.engine import Engine

log = logging.getLogger(__name__)

STATE_FILE = "state.json"
PARTIAL = ".partial"


@dataclass
class TrainingState:
    """What a run must know, besides weights and optimizer, to go on as if it had never stopped."""

    step: int
    """Optimizer steps done."""
    samples: int
    """Training sequences consumed over all ranks: the whole state of the loader."""
    topology: dict[str, int]
    """Sizes that DeepSpeed's files depend on."""
    data_fingerprint: str
    """Identity of the token stream, so that `samples` means the same."""
    loss_sum: float
    """Sums since the last log line, so that the next line is the uninterrupted run's."""
    z_loss_sum: float
    window_tokens: int
    wandb_run_id: str | None


class Checkpointer:
    """Keeps the newest checkpoints of a run; every method is collective."""

    def __init__(self, folder: Path, engine: Engine, owned: OwnedTables | None, *, keep_last: int) -> None:
        self.folder, self.engine, self.owned, self.keep_last = folder, engine, owned, keep_last
        self._writes = dist.get_rank() == 0

    def save(self, state: TrainingState) -> None:
        """Write a checkpoint, then drop those beyond `keep_last`."""
        name = f"step-{state.step:08d}"
        partial = self.folder / (name + PARTIAL)
        if self._writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob("*" + PARTIAL):
                shutil.rmtree(leftover)
        dist.barrier()
        self.engine.save(self.folder, partial.name)
        if self.owned is not None:
            torch.save(self.owned.state(), partial / _owned_file())
        dist.barrier()
        if self._writes:
            (partial / STATE_FILE).write_text(json.dumps(asdict(state), indent=2) + "\n")
            _to_disk(partial)
            if (self.folder / name).exists():
                shutil.rmtree(self.folder / name)
            partial.rename(self.folder / name)
            _to_disk(self.folder, contents=False)
            for old in self.complete()[: -self.keep_last]:
                shutil.rmtree(old)
        dist.barrier()

    def complete(self) -> list[Path]:
        """Return complete checkpoints, oldest first."""
        return sorted(
            path for path in self.folder.glob("step-*") if not path.name.endswith(PARTIAL) and path.is_dir()
        )

    def load_newest(self, topology: dict[str, int], data_fingerprint: str) -> TrainingState | None:
        """Load the newest checkpoint into the engine; None where there is none.

        Raises:
            ConfigError: the checkpoint was made at another topology, or from other data.
        """
        found = self.complete()
        if not found:
            return None
        path = found[-1]
        state = TrainingState(**json.loads((path / STATE_FILE).read_text()))
        for key, value in topology.items():
            if state.topology.get(key) != value:
                raise ConfigError(
                    f"{path} was saved with {key}={state.topology.get(key)} and this run has {key}={value}: "
                    f"start with {key}={state.topology.get(key)} to continue it, or choose another run.name."
                )
        if state.data_fingerprint != data_fingerprint:
            raise ConfigError(
                f"{path} was saved while training on other data than data.path holds now: bring the data (and "
                "the shards that were skipped) back to what it was, or choose another run.name."
            )
        self.engine.load(self.folder, path.name)
        if self.owned is not None:
            self.owned.load_state(torch.load(path / _owned_file(), map_location="cpu", weights_only=True))
        log.info("resumed from %s: %d steps, %d sequences done", path, state.step, state.samples)
        return state

    def set_aside(self) -> None:
        """Move all checkpoints out of the way, for a run that starts anew in an old folder."""
        if self._writes and self.complete():
            number = 1
            while (target := self.folder.with_name(f"{self.folder.name}.replaced-{number}")).exists():
                number += 1
            self.folder.rename(target)
            log.warning("checkpoint.resume=false: the checkpoints of the run before were moved to %s", target)
        dist.barrier()


def _owned_file() -> str:
    return f"tables-{dist.get_rank():05d}.pt"


def _to_disk(folder: Path, *, contents: bool = True) -> None:
    """Ask the operating system to write a folder (and the files in it) before what follows."""
    paths = [folder, *(path for path in folder.rglob("*") if path.is_file())] if contents else [folder]
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
