"""What a worker runs: a whole training of a few steps on one rank, with everything the loop does between them."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tide_mega.checkpoint import TrainingState
from tide_mega.checkpoint.contents import Contents
from tide_mega.config.schema import TideConfig
from tide_mega.dryrun.mode import dry_run
from tide_mega.dryrun.rank import DryRank, build
from tide_mega.dryrun.recorder import Collective, Recorder, Wait
from tide_mega.model.steps import compute_gradients, read_ahead
from tide_mega.parallel.groups import make_host_group
from tide_mega.parallel.megatron_cpu import is_redirected
from tide_mega.plan.rank import Alike
from tide_mega.run.stop import Agreement, Interrupt
from tide_mega.training import setup
from tide_mega.training.batches import StepBatches
from tide_mega.training.evaluation import Evaluator
from tide_mega.training.faults.guard import StepGuard
from tide_mega.training.report import LossWindow
from tide_mega.training.step_traffic import count_step

STEPS = 3
"""Of which the last is looked at: memory made in the first is there."""


@dataclass
class Seen:
    """What a recorder noted in one part of a training."""

    waits: Counter[Wait] = field(default_factory=Counter)
    collectives: Counter[Collective] = field(default_factory=Counter)
    doubles: Counter[tuple[str, str]] = field(default_factory=Counter)
    products: Counter[tuple[str, str]] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)

    @classmethod
    def take(cls, recorder: Recorder) -> "Seen":
        seen = cls(**{name: Counter(getattr(recorder, name)) for name in cls.__dataclass_fields__})
        recorder.clear()
        return seen


@dataclass
class Report:
    """A training of one rank, part by part."""

    build: Seen
    step: Seen
    evaluation: Seen
    snapshot: Seen
    updates: int
    """AdamW's count in the snapshot."""
    boxes: int
    """Pieces of weights and moments in it."""
    is_redirected: bool
    """Whether megatron-core was made to compute on the CPU."""


class Peers(Alike):
    """The first rank of a replica sends tokens, the last stage has labelled ones, and the first owns tables."""

    def __init__(self, config: TideConfig, world_size: int) -> None:
        self.of_a_stage = world_size // config.parallel.pipeline
        self.has_owners = config.memory.num_blocks > 0 and config.memory.owners == "tensor_data"

    def broadcast(self, value: Tensor, source: int, rank: int) -> None:
        if value.dtype == torch.int32 and value.ndim == 4:
            value.copy_((torch.arange(value.numel()) * 7 % 300).view_as(value))

    def objects(self, mine: Any, ranks: list[int]) -> list[Any]:
        if isinstance(mine, bool):  # whether a rank owns tables: `Contents` asks
            return [self.has_owners and rank < self.of_a_stage for rank in ranks]
        return super().objects(mine, ranks)


def train(config: TideConfig, world_size: int, rank: int, run_folder: Path) -> Report:
    """Train, evaluate, and take a checkpoint's snapshot."""
    with dry_run(peers=Peers(config, world_size)) as recorder:
        built = build(config, world_size, rank)
        loop = Loop(built, run_folder)
        at_build = Seen.take(recorder)
        for _ in range(STEPS):
            recorder.clear()
            loop.step()
        step = Seen.take(recorder)
        loop.evaluator.evaluate(STEPS, 0)
        evaluation = Seen.take(recorder)
        contents = Contents(built.engine, config.model, make_host_group())
        contents.snapshot()
        recorder.clear()
        snapshot = contents.snapshot()
        report = Report(
            at_build,
            step,
            evaluation,
            Seen.take(recorder),
            snapshot.updates,
            len(snapshot.weights),
            is_redirected(),
        )
        built.engine.close()
    return report


class Loop:
    """The trainer's loop without its files: see `tide_mega.training.trainer`."""

    def __init__(self, built: DryRank, run_folder: Path) -> None:
        config, device = built.config, built.device.torch_device
        self.built, self.config = built, config
        stream = setup.open_stream(config, "train", is_quiet=True)
        held_out = setup.open_stream(config, "validation", is_quiet=True)
        bins_V = setup.decile_bins(config).to(device)
        self.batches = StepBatches(
            config, stream, built.stage, device, first_sample=0, accumulation=built.accumulation
        )
        self.guard = StepGuard(
            config.faults,
            built.device,
            rank=torch.distributed.get_rank(),
            replica=built.groups.data_rank,
            run_folder=run_folder,
            state={},
        )
        self.window = LossWindow(config.trainer.z_loss, built.groups, bins_V, by_decile=True, restores=True)
        self.window.restore(TrainingState())
        self.agreement = Agreement(Interrupt(catches=False), make_host_group())
        self.evaluator = Evaluator(config, built.stage, held_out, bins_V, built.groups)
        self.ahead = None
        self.next = self.batches.next_step(self.config.trainer.global_batch_size)
        self.done = 0

    def step(self) -> None:
        """Make one step, and get the next one's batches."""
        config, engine = self.config, self.built.engine
        self.done += 1
        self.guard.begin(self.done)
        result = compute_gradients(
            engine,
            self.next,
            config.trainer.z_loss,
            window=config.memory.window,
            ahead=self.ahead,
            own_time=self.guard.own_time,
        )
        count_step(self.built.stage.meter, self.built.stage, config, self.built.accumulation)
        verdict = self.guard.update(engine, result, 1e-3, batch=self.done, can_roll_back=False)
        assert verdict.is_applied
        self.window.add(result, self.next)
        self.agreement.reason()
        self.next = self.batches.next_step(self.config.trainer.global_batch_size)
        self.ahead = read_ahead(self.built.stage, self.next) if config.memory.exchange_ahead else None
