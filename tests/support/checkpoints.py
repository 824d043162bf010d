"""Trainings at one topology and another, and everything a checkpoint holds, whole and by canonical name."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from tests.support.runs import tiny
from tide_mega.checkpoint.agreement import rank_and_size
from tide_mega.checkpoint.contents import Stored
from tide_mega.checkpoint.folder import CheckpointFolder
from tide_mega.checkpoint.saver import Destinations, Keep, save
from tide_mega.checkpoint.state import Identity, SavedState, TrainingState
from tide_mega.checkpoint.weights import whole_tensors
from tide_mega.config.schema import TideConfig
from tide_mega.model.canonical import Box
from tide_mega.model.steps import compute_gradients
from tide_mega.parallel.groups import World
from tide_mega.training.trainer import Trainer


@dataclass(frozen=True)
class Topology:
    """Processes, and how they are used."""

    world: int
    overrides: tuple[str, ...] = ()


TOPOLOGIES = {
    "single": Topology(1),
    "tp2 sp": Topology(2, ("parallel.tensor=2", "parallel.sequence_parallel=true")),
    "dp2": Topology(2),
    "dp2 zero2 owners": Topology(2, ("parallel.zero_stage=2", "memory.owners=tensor_data")),
    "pp2": Topology(2, ("parallel.pipeline=2",)),
    "pp2 vpp2": Topology(2, ("parallel.pipeline=2", "parallel.virtual_pipeline=2")),
    "zero3 dp2": Topology(2, ("parallel.zero_stage=3",)),
    "tp2 dp2 owners": Topology(4, ("parallel.tensor=2", "memory.owners=tensor_data")),
    "tp2 dp2 zero3": Topology(4, ("parallel.tensor=2", "parallel.zero_stage=3")),
    "pp2 dp2 owners": Topology(4, ("parallel.pipeline=2", "memory.owners=tensor_data")),
}
IDENTITY = Identity(model={"num_layers": 1}, data="d", deciles="b", topology={"processes": 2}, versions={})


@dataclass
class Rows:
    """A process's part of a made-up state: one row of `master/table` [2, 64], all equal to a value."""

    rank: int
    world: int
    value: float

    def check(self) -> None:
        """Nothing was wrong."""

    def boxes(self) -> list[Stored]:
        """Row by row; one process alone has both."""
        rows = range(2) if self.world == 1 else [self.rank]
        return [
            Stored(Box("master/table", (2, 64), (r, 0), (1, 64)), torch.full((1, 64), self.value))
            for r in rows
        ]


def destinations(folder: Path, **other: object) -> Destinations:
    """Save to `folder`, keeping everything unless told otherwise."""
    to = Destinations(CheckpointFolder(folder), Keep(last=100), None, Keep(last=100))
    return replace(to, **other)


def write_step(
    folder: Path, step: int, group: ProcessGroup | None = None, save_id: str = "some", **other: object
) -> None:
    """Save a made-up state whose values are the step."""
    rank, world = rank_and_size(group)
    state = SavedState(f"{save_id}{step}", TrainingState(step=step), step, IDENTITY)
    save(Rows(rank, world, float(step)), state, destinations(folder, **other), group)


def write_steps(folder: Path, steps: list[int], save_id: str = "some") -> None:
    """Save made-up states from all workers of a pool."""
    for step in steps:
        write_step(folder, step, dist.group.WORLD, save_id)


FOUR_LAYERS = ("model.num_layers=4", "trainer.eval_every=0", "trainer.eval_sequences=4")


def config_at(name: str, data: Path, root: Path, *overrides: str) -> TideConfig:
    """Compose a tiny run at a topology."""
    topology = TOPOLOGIES[name]
    return tiny(data, root, *FOUR_LAYERS, *topology.overrides, *overrides, world_size=topology.world)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a checkpoint, whole."""
    return dict(whole_tensors(folder))


def resume_and_save(config: TideConfig, folder: Path) -> list[str]:
    """Resume in a pool's worker and save at once elsewhere; return what the log said."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("tide_mega.checkpoint")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    trainer = Trainer(config, World.from_environment())
    try:
        checkpoints = trainer.checkpoints
        checkpoints.to = replace(checkpoints.to, local=CheckpointFolder(folder))
        trainer.checkpoints.save(trainer.state)
        trainer.checkpoints.wait()
        return said
    finally:
        logger.removeHandler(handler)
        trainer.close()


def step_after_resuming(config: TideConfig) -> tuple[int, float, float]:
    """Resume in a pool's worker and make a step; return the step, its mean loss and its gradient norm."""
    trainer = Trainer(config, World.from_environment())
    try:
        batches = trainer.batches.next_step(config.trainer.global_batch_size)
        result = compute_gradients(trainer.engine, batches, trainer.config.trainer.z_loss, window=None)
        trainer.engine.step(1e-3)
        window = trainer.reporter.window
        window.restart(trainer.state.step)
        window.add(result, batches)
        return trainer.state.step, window.means().loss, trainer.engine.grad_norm()
    finally:
        trainer.close()


def differing_from_rounded_masters(config: TideConfig) -> list[str]:
    """Resume in a pool's worker; return the bf16 parameters that are not their fp32 master, rounded."""
    trainer = Trainer(config, World.from_environment())
    try:
        return [
            name
            for name, parameter in trainer.stage.named_parameters()
            if not torch.equal(parameter, trainer.engine.master_weight(parameter).bfloat16())
        ]
    finally:
        trainer.close()
