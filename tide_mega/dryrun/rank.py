"""One rank of a job, built by the training run's own builders."""

from dataclasses import dataclass

from tide_mega.config.schema import TideConfig
from tide_mega.dryrun import groups as other_ranks
from tide_mega.model.stage import TideStage
from tide_mega.parallel.device import Device, choose_device
from tide_mega.parallel.engine import Engine
from tide_mega.parallel.groups import ParallelGroups, World, make_groups, start_distributed
from tide_mega.training import setup


@dataclass(frozen=True)
class DryRank:
    """The parts of a rank before its first step."""

    config: TideConfig
    device: Device
    groups: ParallelGroups
    engine: Engine
    accumulation: int
    """Micro-batches of this rank in an optimizer step."""

    @property
    def stage(self) -> TideStage:
        """This rank's stage of the model."""
        return self.engine.module


def build(config: TideConfig, world_size: int, rank: int) -> DryRank:
    """Build rank `rank` of `world_size`; call within `dry_run`, once per process."""
    device = choose_device("cuda", 0)
    other_ranks.join(rank, world_size)
    start_distributed(
        device,
        World(rank, world_size, 0, 1),
        config.cluster.timeout_minutes,
        deterministic=config.trainer.deterministic,
    )
    groups = make_groups(config.parallel, config.trainer.seed, config.memory.owners)
    trainer = config.trainer
    accumulation = trainer.global_batch_size // (trainer.micro_batch_size * groups.data_size)
    stage = setup.build_stage(config, groups, device)
    engine = setup.build_engine(config, stage, device, accumulation)
    return DryRank(config, device, groups, engine, accumulation)
