"""The training run: what is built, in order, and the loop."""

import logging
import sys

import torch.distributed as dist

from tide_mega.checkpoint import TrainingState
from tide_mega.config.schema import TideConfig
from tide_mega.config.validate import total_steps, validate
from tide_mega.data.batch import TokenBatch
from tide_mega.model.passes import Ahead, compute_gradients, read_ahead
from tide_mega.model.stage import TideStage
from tide_mega.parallel.device import choose_device, set_threads
from tide_mega.parallel.groups import World, make_groups, start_distributed, stop_distributed
from tide_mega.training import setup
from tide_mega.training.batches import StepBatches
from tide_mega.training.evaluation import Evaluator, open_texts
from tide_mega.training.faults.guard import StepGuard
from tide_mega.training.faults.policy import Action, DivergedError
from tide_mega.training.faults.watchdog import Watchdog, hang_seconds
from tide_mega.training.goodput import Ledger
from tide_mega.training.interrupt import Agreement, Interrupt, RunStoppedError, job_interrupt
from tide_mega.training.loggers import Loggers, open_loggers
from tide_mega.training.precision import resolve_precision
from tide_mega.training.reactions import EVALUATION_DUE, FAULTS, Reactions
from tide_mega.training.reporting import Reporter
from tide_mega.training.runfolder import RunFolder, finished_run, open_run_folder
from tide_mega.training.schedule import learning_rate
from tide_mega.training.schedule_traffic import count_step

log = logging.getLogger(__name__)

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
        speaks, device = world.rank == 0, self.device.torch_device
        self.folder = open_run_folder(config, world_size=world.size, device=device, writes=speaks)
        self.watchdog = Watchdog(self.folder.hangs, world.rank, hang_seconds(config))
        self.ledger = Ledger(self.folder.goodput if speaks else None, on_phase=self.watchdog.beat)
        self.stream = setup.open_stream(config, "train", is_quiet=not speaks)
        held_out = setup.open_stream(config, "validation", is_quiet=not speaks)
        texts = open_texts(config)
        stage = setup.build_stage(config, self.groups, self.device)
        self.engine = setup.build_engine(config, stage, self.device, self.accumulation)
        bins_V = setup.decile_bins(config).to(device)
        self.checkpoints = setup.open_checkpoints(config, self.folder, self.engine, self.stream, bins_V)
        if speaks:
            setup.describe(config, self.stage, self.device, self.stream, held_out)
        with self.ledger.spend("resume"):
            self.state = self.checkpoints.resume() or TrainingState()
        self.has_checkpoint = self.state.step > 0
        self.interrupt = interrupt or Interrupt(catches=False)
        self.agreement = Agreement(self.interrupt, device)
        self.guard = StepGuard(
            config.faults,
            self.device,
            rank=world.rank,
            replica=self.groups.data_rank,
            run_folder=self.folder.path,
            state=self.state.extra.get(FAULTS, {}),
        )
        self.batches = StepBatches(
            config,
            self.stream,
            self.stage,
            device,
            first_sample=self.state.samples,
            accumulation=self.accumulation,
        )
        evaluates_again = bool(self.state.extra.get(EVALUATION_DUE))
        self.reporter = Reporter(
            config,
            engine=self.engine,
            device=self.device,
            bins_V=bins_V,
            evaluator=Evaluator(config, self.stage, held_out, bins_V, self.groups, texts),
            guard=self.guard,
            ledger=self.ledger,
            state=self.state,
            loggers=open_loggers(config, self.folder, self.state, evaluates_again=evaluates_again)
            if speaks
            else Loggers(),
        )
        self.reactions = Reactions(self.state, self.guard, self.checkpoints, self.ledger, self.reporter)

    @property
    def stage(self) -> TideStage:
        """This process's part of the model."""
        return self.engine.module

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
        if self.state.step >= self.total_steps:
            log.info("%s is complete: %d steps done, nothing to train", self.folder.path, self.state.step)
        else:
            if self.world.rank == 0:
                self.folder.mark_unfinished()
            with self.interrupt:
                self._train()
        if self.world.rank == 0:
            self.folder.mark_finished(self.state.step)

    def _train(self) -> None:
        config, state = self.config, self.state
        stop: str | None = None
        self.watchdog.start()
        self.ledger.enter("other")
        self.ledger.go_back(state.step)
        self.reporter.start()
        if state.extra.get(EVALUATION_DUE):
            self.reporter.evaluate(self.watchdog.beat)
        batches = self._next_batches()
        ahead: Ahead | None = None
        while state.step < self.total_steps and stop is None:
            logged = self._is_due(state.step + 1, config.logging.every)
            lr = learning_rate(state.step, config.optim, self.total_steps)
            has_gone_back = self._step(batches, ahead, lr, logged=logged) is Action.ROLL_BACK
            if logged and not has_gone_back:
                self.reporter.look_at_traffic()
            if state.step < self.total_steps and not has_gone_back:
                stop = self.agreement.reason()
            done = batches
            if state.step < self.total_steps and stop is None:
                batches = self._next_batches()
                ahead = read_ahead(self.stage, batches) if config.memory.exchange_ahead else None
            if has_gone_back:
                continue
            if logged:
                self.reporter.log_step(lr, done)
            evaluation_due = self._is_due(state.step, config.trainer.eval_every)
            if stop is not None:  # a kill may be near: the evaluation is left to the continued run
                log.info("%s: saving after step %d, then stopping", stop, state.step)
                self._save(evaluation_due=evaluation_due)
            elif evaluation_due:
                self.reporter.evaluate(self.watchdog.beat)
            at_end = config.checkpoint.at_end
            if stop is None and self._is_due(state.step, config.checkpoint.every, at_end=at_end):
                self._save()
        with self.ledger.spend("checkpoint"):
            self.checkpoints.wait()
        self.agreement.close()
        if stop is not None:
            message = f"{stop}: stopped after step {state.step}; the same command continues the run"
            raise RunStoppedError(message)

    def _step(self, batches: list[TokenBatch], ahead: Ahead | None, lr: float, *, logged: bool) -> Action:
        """Make one optimizer step, and deal with what may be wrong with it; say what became of it."""
        config, state = self.config, self.state
        productive = self.ledger.productive()
        self.ledger.enter("compute")
        batch = state.samples // config.trainer.global_batch_size + 1
        self.guard.begin(batch)
        self.reporter.before_step(logged=logged)
        result = compute_gradients(
            self.engine,
            batches,
            config.trainer.z_loss,
            window=config.memory.window,
            ahead=ahead,
            own_time=self.guard.own_time,
        )
        count_step(self.stage.meter, self.stage, config, self.accumulation)
        if logged:
            self.reporter.look_at_gradients()
        verdict = self.guard.update(self.engine, result, lr, batch=batch, can_roll_back=self.has_checkpoint)
        self.ledger.enter("other")
        state.step += 1
        state.samples += config.trainer.global_batch_size
        self.checkpoints.poll()
        if verdict.is_applied:
            self.reporter.add(result, batches)
        return verdict.action if verdict.reason is None else self.reactions.deal_with(verdict, productive)

    def close(self) -> None:
        """End loader processes, close logs, release the engine; say how the run went."""
        error = sys.exception()
        has_trained = self.ledger.enter("shutdown") != "startup"
        try:
            self.batches.close()
            self.checkpoints.close()
            self.reporter.loggers.close()
            self.engine.close()
        finally:
            self.watchdog.close()
            if has_trained and self.world.rank == 0:
                self.ledger.write()
                self.reporter.summarise(self.folder, error)

    def _next_batches(self) -> list[TokenBatch]:
        with self.ledger.spend("data wait"):
            return self.batches.next_step()

    def _is_due(self, step: int, every: int, *, at_end: bool = True) -> bool:
        """Every n steps, and at the last step."""
        return (at_end and step == self.total_steps) or (every > 0 and step % every == 0)

    def _save(self, *, evaluation_due: bool = False) -> None:
        with self.ledger.spend("checkpoint"):
            self.reporter.keep()
            self.state.extra |= {FAULTS: self.guard.policy.state(), EVALUATION_DUE: evaluation_due}
            self.checkpoints.save(self.state)
        self.has_checkpoint = True
        self.ledger.mark_saved(self.state.step)
        self.ledger.write()
