"""The training run: what is built, in order, and the loop."""

import logging
import math
import sys
from dataclasses import asdict

import torch
import torch.distributed as dist

from tide_mega.checkpoint import Checkpointer, Identity, TrainingState
from tide_mega.config.schema import TideConfig
from tide_mega.config.sizes import flops_per_token
from tide_mega.config.validate import total_steps, validate
from tide_mega.data.batch import TokenBatch
from tide_mega.metrics.jsonl import JsonlLogger
from tide_mega.metrics.records import EvalRecord, EventRecord, TrainRecord
from tide_mega.model.passes import Ahead, StepResult, compute_gradients, read_ahead
from tide_mega.model.stage import TideStage
from tide_mega.parallel.device import choose_device, set_threads
from tide_mega.parallel.groups import World, make_groups, start_distributed, stop_distributed, sum_over
from tide_mega.training.batches import StepBatches
from tide_mega.training.evaluation import Evaluator
from tide_mega.training.faults.guard import StepGuard
from tide_mega.training.faults.policy import Action, DivergedError, Verdict
from tide_mega.training.faults.watchdog import Watchdog, hang_seconds
from tide_mega.training.goodput import Ledger
from tide_mega.training.interrupt import Agreement, Interrupt, RunStoppedError, job_interrupt
from tide_mega.training.loggers import Loggers
from tide_mega.training.optimizer import TABLES
from tide_mega.training.precision import resolve_precision
from tide_mega.training.progress import Progress
from tide_mega.training.runfolder import RunFolder, finished_run, open_run_folder
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
from tide_mega.training.summary import publish, summarise
from tide_mega.training.throughput import Throughput
from tide_mega.training.wandb_logger import WandbLogger

log = logging.getLogger(__name__)

FAULTS = "faults"
"""Name under which checkpoints keep what the fault policy must remember."""

__all__ = ["DivergedError", "Trainer", "train"]


def train(config: TideConfig) -> RunFolder:
    """Train, or finish training, the run that the configuration describes; return its folder.

    Raises:
        ConfigError: the configuration cannot run here, or does not fit the run folder or the data.
        DivergedError: steps went wrong more often than `faults` allows.
        RunStoppedError: a signal came or the job's time is nearly up, and a checkpoint is written.
    """
    if (finished := finished_run(config, total_steps(config))) is not None:
        return finished
    world = World.from_environment()
    validate(config, world.size)
    device = choose_device(config.cluster.device, world.local_rank)
    set_threads(config.cluster.threads, world.local_size)
    start_distributed(device, world, config.cluster.timeout_minutes)
    try:
        trainer = Trainer(config, world, job_interrupt(config.cluster.stop_before_minutes))
        try:
            trainer.run()
        finally:
            trainer.close()
        return trainer.folder
    except RunStoppedError:
        dist.barrier()  # SLURM ends the tasks that outlive the first by long, and rank 0 has logs to write out
        raise
    finally:
        stop_distributed()


class Trainer:
    """One process of a training run."""

    def __init__(self, config: TideConfig, world: World, interrupt: Interrupt | None = None) -> None:
        self.device = choose_device(config.cluster.device, world.local_rank)
        config = resolve_precision(config, self.device)
        self.config, self.world = config, world
        self.total_steps = total_steps(config)
        self.groups = make_groups(config.parallel, config.trainer.seed, config.memory.owners)
        self.folder = open_run_folder(
            config, world_size=world.size, device=self.device.torch_device, writes=world.rank == 0
        )
        self.watchdog = Watchdog(self.folder.hangs, world.rank, hang_seconds(config))
        self.ledger = Ledger(self.folder.goodput if world.rank == 0 else None, on_phase=self.watchdog.beat)
        self.stream, self.held_out = (
            open_stream(config, split, is_quiet=world.rank != 0) for split in ("train", "validation")
        )
        stage = build_stage(config, self.groups, self.device)
        self.engine = build_engine(config, stage, self.device, self.accumulation)
        bins_V = decile_bins(config).to(self.device.torch_device)
        self.evaluator = Evaluator(config, self.stage, self.held_out, bins_V, self.groups)
        bins = bins_V.cpu().numpy().tobytes()
        self.checkpoints = Checkpointer(
            self.folder.checkpoints,
            self.engine,
            config.model,
            config.checkpoint,
            Identity.of(config, self.stream.fingerprint, bins, world.size),
        )
        if world.rank == 0:
            describe(config, self.stage, self.device, self.stream, self.held_out)
        self.last_train: TrainRecord | None = None
        self.last_eval: EvalRecord | None = None
        with self.ledger.spend("resume"):
            self.state = self.checkpoints.resume() or TrainingState()
        self.has_checkpoint = self.state.step > 0
        self.interrupt = interrupt or Interrupt(catches=False)
        self.agreement = Agreement(self.interrupt, self.device.torch_device)
        self.guard = StepGuard(
            config.faults,
            self.device,
            rank=world.rank,
            replica=self.groups.data_rank,
            run_folder=self.folder.path,
            state=self.state.extra.get(FAULTS, {}),
        )
        self.loggers = self._open_loggers()
        self.batches = self._open_batches()
        self.throughput = Throughput(
            tokens_per_step=self.tokens_per_step,
            flops_per_token=flops_per_token(config.model, config.memory, config.data.seq_length),
            devices=world.size,
            peak_tflops=device_peak(config, self.device, is_quiet=world.rank != 0),
            total_steps=self.total_steps,
            clock=self.ledger.training_seconds,
        )
        # [cross entropy, weighted z-loss, tokens] since the last log line, on this rank.
        self.window = torch.zeros(3, dtype=torch.float64, device=self.device.torch_device)
        self._restore_window()

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
        """Train from where the run stands to its end.

        Raises:
            RunStoppedError: asked to stop before the end; a checkpoint is written.
        """
        step = self.state.step
        if step >= self.total_steps:
            log.info("%s is complete: %d steps done, nothing to train", self.folder.path, step)
            self._mark_finished()
            return
        if self.world.rank == 0:
            self.folder.mark_unfinished()
        with self.interrupt:
            self._train()
        self._mark_finished()

    def _mark_finished(self) -> None:
        if self.world.rank == 0:
            self.folder.mark_finished(self.state.step)

    def _train(self) -> None:
        config, state = self.config, self.state
        stop: str | None = None
        self.watchdog.start()
        self.ledger.enter("other")
        self.ledger.go_back(state.step)
        self.throughput.start(state.step)
        batches = self._next_batches()
        ahead: Ahead | None = None
        while state.step < self.total_steps and stop is None:
            productive = self.ledger.productive()
            self.ledger.enter("compute")
            batch = state.samples // config.trainer.global_batch_size + 1
            self.guard.begin(batch)
            logged = self._is_due(state.step + 1, config.logging.every)
            self.stage.board.alpha_L = {} if logged else None
            result = compute_gradients(
                self.engine,
                batches,
                config.trainer.z_loss,
                window=config.memory.window,
                ahead=ahead,
                own_time=self.guard.own_time,
            )
            count_step(self.stage.meter, self.stage, config, self.accumulation)
            table_norm = self._table_norm() if logged else None
            lr = learning_rate(state.step, config.optim, self.total_steps)
            verdict = self.guard.update(
                self.engine, result, lr, batch=batch, can_roll_back=self.has_checkpoint
            )
            self.ledger.enter("other")
            state.step += 1
            state.samples += config.trainer.global_batch_size
            self.checkpoints.poll()
            if verdict.is_applied:
                self._add_to_window(result)
            elif verdict.action is Action.SKIP:
                self.ledger.waste(productive)
            if verdict.reason is not None:
                self._deal_with(verdict)
            has_gone_back = verdict.action is Action.ROLL_BACK
            if state.step < self.total_steps and not has_gone_back:
                stop = self.agreement.reason()
            if state.step < self.total_steps and stop is None:
                batches = self._next_batches()
                ahead = read_ahead(self.stage, batches) if config.memory.exchange_ahead else None

            if has_gone_back:
                continue
            if logged:
                self._log(lr, table_norm)
            if stop is not None:
                log.info("%s: saving after step %d, then stopping", stop, state.step)
                self._save()
            if self._is_due(state.step, config.trainer.eval_every):
                self._evaluate()
            if stop is None and self._is_due(
                state.step, config.checkpoint.every, at_end=config.checkpoint.at_end
            ):
                self._save()
        with self.ledger.spend("checkpoint"):
            self.checkpoints.wait()
        self.agreement.close()
        if stop is not None:
            raise RunStoppedError(
                f"{stop}: stopped after step {state.step}; the same command continues the run"
            )

    def close(self) -> None:
        """End loader processes, close logs, release the engine; say how the run went."""
        error = sys.exception()
        has_trained = self.ledger.enter("shutdown") != "startup"
        try:
            self.batches.close()
            self.checkpoints.close()
            self.loggers.close()
            self.engine.close()
        finally:
            self.watchdog.close()
            if has_trained and self.world.rank == 0:
                self.ledger.write()
                summary = summarise(
                    self.ledger,
                    self.guard.policy.counts,
                    steps=self.state.step,
                    total_steps=self.total_steps,
                    tokens=self._tokens_done(),
                    last_train=self.last_train,
                    last_eval=self.last_eval,
                    error=error,
                )
                publish(summary, self.folder.summary)

    def _next_batches(self) -> list[TokenBatch]:
        with self.ledger.spend("data wait"):
            return self.batches.next_step()

    def _deal_with(self, verdict: Verdict) -> None:
        """Log a step that was not as it should be; stop, or go back to the newest checkpoint, if need be."""
        at_step = self.state.step
        self.guard.tell(verdict, at_step)
        if verdict.action is Action.ROLL_BACK:
            self._roll_back()
        names = {Action.APPLY: "spike", Action.SKIP: "skipped", Action.ROLL_BACK: "rollback"}
        self.loggers.log_event(
            EventRecord(
                step=self.state.step,
                tokens=self._tokens_done(),
                event=names[verdict.action],
                reason=verdict.reason or "",
                at_step=at_step,
                loss=verdict.loss,
                z_score=verdict.z_score,
            )
        )

    def _roll_back(self) -> None:
        """Load the newest checkpoint, but go on with the data that comes next."""
        samples = self.state.samples
        with self.ledger.spend("resume"):
            loaded = self.checkpoints.restore()
        if loaded is None:
            log.warning("there is no whole checkpoint to go back to: the step is skipped")
            return
        vars(self.state).update(vars(loaded))
        self.state.samples = samples
        self.guard.policy.rewind(self.state.extra.get(FAULTS, {}))
        self.ledger.go_back(self.state.step)
        self.loggers.rewind(self.state.step)
        self.throughput.start(self.state.step)
        self.stage.meter.read()
        self._restore_window()

    def _restore_window(self) -> None:
        """Take the sums since the last log line that the state holds."""
        self.window.zero_()
        if self.world.rank == 0:
            values = [self.state.loss_sum, self.state.z_loss_sum, self.state.window_tokens]
            self.window += torch.tensor(values, dtype=torch.float64, device=self.device.torch_device)

    def _is_due(self, step: int, every: int, *, at_end: bool = True) -> bool:
        """Every n steps, and at the last step."""
        return (at_end and step == self.total_steps) or (every > 0 and step % every == 0)

    def _tokens_done(self) -> int:
        return self.state.samples * self.config.data.seq_length

    def _add_to_window(self, result: StepResult) -> None:
        z_loss = self.config.trainer.z_loss * result.z_square_sum
        self.window += torch.stack([result.loss_sum.double(), z_loss.double(), result.tokens.double()])

    def _window_sums(self) -> list[float]:
        """Sum the window over data parallelism."""
        window = sum_over(self.groups.pipeline, sum_over(self.groups.data, self.window.clone()))
        return window.tolist()

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
        slow = self.guard.stragglers()
        counts = self.guard.policy.counts
        self.last_train = TrainRecord(
            step=self.state.step,
            tokens=self._tokens_done(),
            loss=loss_sum / tokens if tokens else math.nan,
            z_loss=z_loss_sum / tokens if tokens else math.nan,
            grad_norm=self.engine.grad_norm(),
            grad_norm_tables=table_norm,
            lr=lr,
            null_weight_by_layer=self._null_weights(),
            traffic=self.stage.meter.read(),
            goodput=self.ledger.goodput(),
            skipped_steps=counts.skipped_steps,
            spikes=counts.spikes,
            rollbacks=counts.rollbacks,
            slowest_ratio=slow.slowest_ratio,
            slow_ranks=[rank for replica in slow.slow for rank in replica.ranks],
            **asdict(reading),
        )
        self.loggers.log_train(self.last_train)
        self.ledger.write()

    def _evaluate(self) -> None:
        with self.ledger.spend("evaluation"):
            self.last_eval = self.evaluator.evaluate(
                self.state.step, self._tokens_done(), on_progress=self.watchdog.beat
            )
            self.loggers.log_eval(self.last_eval)

    def _null_weights(self) -> list[float | None]:
        """Mean null-bank weight of each layer over the tokens of the step."""
        if self.stage.num_blocks == 0:
            return []
        means_L = self.stage.null_weights().float().mean(dim=(1, 2))
        self.stage.board.alpha_L = None
        return (sum_over(self.groups.data, means_L) / self.groups.data_size).tolist()

    def _save(self) -> None:
        with self.ledger.spend("checkpoint"):
            self.state.loss_sum, self.state.z_loss_sum, tokens = self._window_sums()
            self.state.window_tokens = int(tokens)
            self.state.extra[FAULTS] = self.guard.policy.state()
            self.checkpoints.save(self.state)
        self.has_checkpoint = True
        self.ledger.mark_saved(self.state.step)
        self.ledger.write()

    def _open_loggers(self) -> Loggers:
        if self.world.rank != 0:
            return Loggers()
        wandb_logger = WandbLogger(
            self.config.logging,
            self.folder.path,
            name=self.config.run.name,
            run_config=asdict(self.config),
            run_id=(self.folder.read_wandb_id() if self.config.checkpoint.resume else None)
            or self.state.wandb_run_id,
        )
        self.state.wandb_run_id = wandb_logger.run_id
        self.folder.write_wandb_id(wandb_logger.run_id)
        resumed = self.state.step if self.state.step else None
        return Loggers(
            [
                JsonlLogger(self.folder.metrics, resumed, self._tokens_done()),
                Progress(self.total_steps),
                wandb_logger,
            ]
        )

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
