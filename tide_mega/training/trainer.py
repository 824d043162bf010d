"""The training run: what is built, in order, and the loop."""

import logging
import math
from dataclasses import asdict

import torch
import torch.distributed as dist

from tide_mega.config.schema import TideConfig
from tide_mega.config.sizes import flops_per_token
from tide_mega.config.validate import total_steps, validate
from tide_mega.model.stage import TideStage
from tide_mega.parallel.device import choose_device, set_threads
from tide_mega.parallel.groups import World, make_groups, start_distributed, stop_distributed, sum_over
from tide_mega.training.batches import StepBatches
from tide_mega.training.checkpoint import Checkpointer, TrainingState
from tide_mega.training.evaluation import Evaluator
from tide_mega.training.jsonl import JsonlLogger
from tide_mega.training.loggers import Loggers
from tide_mega.training.optimizer import TABLES
from tide_mega.training.precision import resolve_precision
from tide_mega.training.progress import Progress
from tide_mega.training.records import TrainRecord
from tide_mega.training.runfolder import RunFolder, open_run_folder
from tide_mega.training.schedule import learning_rate
from tide_mega.training.schedule_traffic import count_step
from tide_mega.training.setup import (
    build_engine,
    build_stage,
    decile_bins,
    describe,
    device_peak,
    open_stream,
)
from tide_mega.training.step import Ahead, StepResult, compute_gradients, read_ahead
from tide_mega.training.throughput import Throughput
from tide_mega.training.wandb_logger import WandbLogger

log = logging.getLogger(__name__)


def train(config: TideConfig) -> RunFolder:
    """Train, or finish training, the run that the configuration describes; return its folder.

    Raises:
        ConfigError: the configuration cannot run here, or does not fit the run folder or the data.
        DivergedError: the loss is no longer a number.
    """
    world = World.from_environment()
    validate(config, world.size)
    device = choose_device(config.cluster.device, world.local_rank)
    set_threads(config.cluster.threads, world.local_size)
    start_distributed(device, world, config.cluster.timeout_minutes)
    try:
        trainer = Trainer(config, world)
        try:
            trainer.run()
        finally:
            trainer.close()
        return trainer.folder
    finally:
        stop_distributed()


class DivergedError(RuntimeError):
    """The loss or its gradient became NaN or infinite."""


ADVICE = (
    "the newest checkpoint is from before; lower optim.lr, raise optim.warmup_steps, or look at the data that "
    "follows it"
)


class Trainer:
    """One process of a training run."""

    def __init__(self, config: TideConfig, world: World) -> None:
        self.device = choose_device(config.cluster.device, world.local_rank)
        config = resolve_precision(config, self.device)
        self.config, self.world = config, world
        self.total_steps = total_steps(config)
        self.groups = make_groups(config.parallel, config.trainer.seed, config.memory.owners)
        self.folder = open_run_folder(
            config, world_size=world.size, device=self.device.torch_device, writes=world.rank == 0
        )
        self.stream, self.held_out = (
            open_stream(config, split, is_quiet=world.rank != 0) for split in ("train", "validation")
        )
        stage = build_stage(config, self.groups, self.device)
        self.engine = build_engine(config, stage, self.device, self.accumulation)
        bins_V = decile_bins(config).to(self.device.torch_device)
        self.evaluator = Evaluator(config, self.stage, self.held_out, bins_V, self.groups)
        self.checkpoints = Checkpointer(
            self.folder.checkpoints, self.engine, self.stage.owned, keep_last=config.checkpoint.keep_last
        )
        if world.rank == 0:
            describe(config, self.stage, self.device, self.stream, self.held_out)
        self.state = self._resume()
        self.loggers = self._open_loggers()
        self.batches = self._open_batches()
        self.throughput = Throughput(
            tokens_per_step=self.tokens_per_step,
            flops_per_token=flops_per_token(config.model, config.memory, config.data.seq_length),
            devices=world.size,
            peak_tflops=device_peak(config, self.device, is_quiet=world.rank != 0),
            total_steps=self.total_steps,
        )
        # [cross entropy, weighted z-loss, tokens] since the last log line, on this rank.
        self.window = torch.zeros(3, dtype=torch.float64, device=self.device.torch_device)
        if world.rank == 0:
            values = [self.state.loss_sum, self.state.z_loss_sum, self.state.window_tokens]
            self.window += torch.tensor(values, dtype=torch.float64, device=self.device.torch_device)

    @property
    def stage(self) -> TideStage:
        """This process's part of the model."""
        return self.engine.module

    @property
    def tokens_per_step(self) -> int:
        """Training tokens of an optimizer step over all ranks."""
        return self.config.trainer.global_batch_size * self.config.data.seq_length

    @property
    def accumulation(self) -> int:
        """Microbatches of this rank in an optimizer step."""
        trainer = self.config.trainer
        return trainer.global_batch_size // (trainer.micro_batch_size * self.groups.data_size)

    def run(self) -> None:
        """Train from where the run stands to its end."""
        config, state = self.config, self.state
        if state.step >= self.total_steps:
            log.info("%s is complete: %d steps done, nothing to train", self.folder.path, state.step)
            return
        self.throughput.start(state.step)
        batches = self.batches.next_step()
        ahead: Ahead | None = None
        while state.step < self.total_steps:
            logged = self._is_due(state.step + 1, config.logging.every)
            self.stage.board.null_weights_L = {} if logged else None
            result = compute_gradients(
                self.engine, batches, config.trainer.z_loss, window=config.memory.window, ahead=ahead
            )
            self._add_to_window(result)
            count_step(self.stage.meter, self.stage, config, self.accumulation)
            table_norm = self._table_norm() if logged else None
            lr = learning_rate(state.step, config.optim, self.total_steps)
            if not self.engine.step(lr):
                raise DivergedError(f"the gradient is not finite at step {state.step + 1}: {ADVICE}")
            state.step += 1
            state.samples += config.trainer.global_batch_size
            if state.step < self.total_steps:
                batches = self.batches.next_step()
                ahead = read_ahead(self.stage, batches) if config.memory.exchange_ahead else None

            if logged:
                self._log(lr, table_norm)
            with self.throughput.paused():
                if self._is_due(state.step, config.trainer.eval_every):
                    self.loggers.log_eval(self.evaluator.evaluate(state.step, self._tokens_done()))
                if self._is_due(state.step, config.checkpoint.every, at_end=config.checkpoint.at_end):
                    self._save()

    def close(self) -> None:
        """End loader processes, close logs, release the engine."""
        self.batches.close()
        self.loggers.close()
        self.engine.close()

    def _is_due(self, step: int, every: int, *, at_end: bool = True) -> bool:
        """Every n steps, and at the last step."""
        return (at_end and step == self.total_steps) or (every > 0 and step % every == 0)

    def _tokens_done(self) -> int:
        return self.state.samples * self.config.data.seq_length

    def _add_to_window(self, result: StepResult) -> None:
        z_loss = self.config.trainer.z_loss * result.z_square_sum
        self.window += torch.stack([result.loss_sum.double(), z_loss.double(), result.tokens.double()])

    def _window_sums(self) -> list[float]:
        """Sum the window over data parallelism; the first moment of a step at which the host waits."""
        window = sum_over(self.groups.pipeline, sum_over(self.groups.data, self.window.clone()))
        sums = window.tolist()
        if not math.isfinite(sums[0] + sums[1]):
            raise DivergedError(f"the loss is not finite at step {self.state.step}: {ADVICE}")
        return sums

    def _table_norm(self) -> float | None:
        """Norm of the tables' part of the gradient; None without memory, and where ZeRO-3 keeps it apart."""
        if self.config.memory.num_blocks == 0 or self.config.parallel.zero_stage == 3:
            return None
        if self.config.memory.owners == "tensor":
            return self.engine.group_grad_norm(TABLES)
        square = torch.zeros((), dtype=torch.float64, device=self.device.torch_device)
        if self.stage.owned is not None:
            square += self.stage.owned.square_norm()
        dist.all_reduce(square)
        return math.sqrt(float(square))

    def _log(self, lr: float, table_norm: float | None) -> None:
        loss_sum, z_loss_sum, tokens = self._window_sums()
        self.window.zero_()
        reading = self.throughput.read(self.state.step)
        self.loggers.log_train(
            TrainRecord(
                step=self.state.step,
                tokens=self._tokens_done(),
                loss=loss_sum / tokens,
                z_loss=z_loss_sum / tokens,
                grad_norm=self.engine.grad_norm(),
                grad_norm_tables=table_norm,
                lr=lr,
                null_weight_by_layer=self._null_weights(),
                traffic=self.stage.meter.read(),
                **asdict(reading),
            )
        )

    def _null_weights(self) -> list[float | None]:
        """Mean null-bank weight of each layer over the tokens of the step."""
        if self.stage.num_blocks == 0:
            return []
        means_L = self.stage.null_weights().float().mean(dim=(1, 2))
        self.stage.board.null_weights_L = None
        return (sum_over(self.groups.data, means_L) / self.groups.data_size).tolist()

    def _save(self) -> None:
        self.state.loss_sum, self.state.z_loss_sum, tokens = self._window_sums()
        self.state.window_tokens = int(tokens)
        self.checkpoints.save(self.state)

    def _resume(self) -> TrainingState:
        topology = {
            "memory.owners=tensor_data": int(self.config.memory.owners == "tensor_data"),
            "parallel.tensor": self.groups.tensor_size,
            "parallel.pipeline": self.groups.pipeline.size(),
            "parallel.virtual_pipeline": self.config.parallel.virtual_pipeline,
            "parallel.zero_stage": self.config.parallel.zero_stage,
            "data-parallel size": self.groups.data_size,
        }
        fingerprint = self.stream.fingerprint
        if not self.config.checkpoint.resume:
            self.checkpoints.set_aside()
        resumed = self.checkpoints.load_newest(topology, fingerprint)
        return resumed or TrainingState(0, 0, topology, fingerprint, 0.0, 0.0, 0, None)

    def _open_loggers(self) -> Loggers:
        if self.world.rank != 0:
            return Loggers()
        wandb_logger = WandbLogger(
            self.config.logging,
            self.folder.path,
            name=self.config.run.name,
            run_config=asdict(self.config),
            run_id=self.state.wandb_run_id,
        )
        self.state.wandb_run_id = wandb_logger.run_id
        resumed = self.state.step if self.state.step else None
        return Loggers([JsonlLogger(self.folder.metrics, resumed), Progress(self.total_steps), wandb_logger])

    def _open_batches(self) -> StepBatches:
        return StepBatches(
            self.config,
            self.stream,
            self.groups,
            self.device.torch_device,
            self.stage.meter,
            first_sample=self.state.samples,
            accumulation=self.accumulation,
        )
