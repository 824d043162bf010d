"""The training run: assembles its parts in order, runs the loop, and reacts to faulty steps.

A step that the fault policy does not apply as usual is logged and, if the verdict says so, undone by a rollback
to the newest checkpoint (`Reactions`).
"""

import logging
import sys
from dataclasses import replace

import torch.distributed as dist

from tide_mega.checkpoint import Checkpointer, TrainingState
from tide_mega.config.schema import TideConfig
from tide_mega.config.validate import validate
from tide_mega.data.loader import TokenBatch
from tide_mega.memory.memory import Request
from tide_mega.model.stage import TideStage
from tide_mega.model.steps import compute_gradients, read_ahead
from tide_mega.parallel.affinity import take_cores
from tide_mega.parallel.device import choose_device
from tide_mega.parallel.groups import World, make_groups, make_host_group, start_distributed, stop_distributed
from tide_mega.run.course import Course, Stride
from tide_mega.run.folder import RunFolder, finished_run, held, open_run_folder
from tide_mega.run.stop import Agreement, Interrupt, RunStoppedError, job_interrupt
from tide_mega.training import setup
from tide_mega.training.batches import LeftOut, StepBatches
from tide_mega.training.evaluation import Evaluator, open_texts
from tide_mega.training.exports import Exports
from tide_mega.training.faults.guard import StepGuard
from tide_mega.training.faults.policy import Action, DivergedError, Verdict
from tide_mega.training.faults.watchdog import Watchdog, hang_seconds
from tide_mega.training.goodput import Ledger
from tide_mega.training.loggers import Loggers, open_loggers
from tide_mega.training.outset import SCHEDULE, check_outset, set_out
from tide_mega.training.report import Reporter
from tide_mega.training.setup import resolve_precision
from tide_mega.training.step_traffic import count_step

__all__ = ["DivergedError", "Trainer", "train"]


log = logging.getLogger(__name__)

FAULTS = "faults"
"""Key under which checkpoints keep the state of the fault policy."""
EVALUATION_DUE = "evaluation_due"
"""Key under which a checkpoint notes that the evaluation due after its step has not been made yet."""
EVENTS = {Action.APPLY: "spike", Action.SKIP: "skipped", Action.ROLL_BACK: "rollback"}


class Reactions:
    """Handles faulty steps: logs them and, if configured, rolls the run back to the newest checkpoint."""

    def __init__(
        self,
        state: TrainingState,
        guard: StepGuard,
        checkpoints: Checkpointer,
        ledger: Ledger,
        reporter: Reporter,
    ) -> None:
        self._state, self._guard, self._checkpoints = state, guard, checkpoints
        self._ledger, self._reporter = ledger, reporter

    def deal_with(self, verdict: Verdict, productive: float) -> Action:
        """Handle a faulty step: log it, after rolling back if that is the verdict; collective.

        Args:
            verdict: of the step just made.
            productive: the ledger's productive seconds before the step.

        Returns:
            The action taken: the verdict's, except that a rollback without a checkpoint becomes a skip.

        Raises:
            DivergedError: faults are more frequent than the `faults` section allows.
        """
        at_step = self._state.step
        if verdict.action is Action.SKIP:
            self._ledger.waste(productive)
        try:
            self._guard.tell(verdict, at_step)
            if verdict.action is Action.ROLL_BACK and not self._roll_back():
                verdict = replace(verdict, action=Action.SKIP)
                self._ledger.waste(productive)
                counts = self._guard.policy.counts  # the rollback that was decided on is already counted
                counts.rollbacks -= 1
                counts.skipped_steps += 1
                counts.skipped_in_a_row += 1
                self._guard.tell(verdict, at_step)
        finally:  # of the step that ends the run too
            self._reporter.log_event(EVENTS[verdict.action], verdict, at_step)
        return verdict.action

    def _roll_back(self) -> bool:
        """Load the newest checkpoint but keep the data position; return whether there was a checkpoint."""
        with self._ledger.spend("resume"):
            loaded = self._checkpoints.restore()
        if loaded is None:
            log.warning("there is no whole checkpoint to go back to")
            return False
        self._state.go_back_to(loaded)
        self._guard.policy.rewind(self._state.extra.get(FAULTS, {}))
        self._ledger.go_back(self._state.step)
        self._reporter.rewind()
        return True


def train(config: TideConfig) -> RunFolder:
    """Start or resume the run that the configuration describes, train it to its end, and return its folder.

    Raises:
        ConfigError: the configuration cannot run here, or does not fit the run folder or the data.
        DivergedError: faults are more frequent than the `faults` section allows.
        FolderTakenError: another process is using the run folder.
        RunStoppedError: a signal arrived or the job is nearly out of time; a checkpoint has been written.
    """
    world = World.from_environment()
    validate(config, world.size)
    course = Course.of(config)
    if (finished := finished_run(config, course)) is not None:
        return finished
    check_outset(config, course)
    device = choose_device(config.cluster.device, world.local_rank)
    take_cores(device, config.cluster.threads, world)
    deterministic = config.trainer.deterministic
    start_distributed(device, world, config.cluster.timeout_minutes, deterministic=deterministic)
    try:
        with held(config, writes=world.rank == 0):
            trainer = Trainer(config, world, job_interrupt(config.cluster.stop_before_minutes))
            try:
                trainer.run()
            finally:
                trainer.close()
        return trainer.folder
    except RunStoppedError:
        dist.barrier()  # SLURM kills tasks that long outlive the first to exit, and rank 0 has logs to flush
        raise
    finally:
        stop_distributed()


class Trainer:
    """One process of a training run."""

    def __init__(self, config: TideConfig, world: World, interrupt: Interrupt | None = None) -> None:
        self.device = choose_device(config.cluster.device, world.local_rank)
        config = resolve_precision(config, self.device)
        self.config, self.world = config, world
        self.course = Course.of(config)
        self.groups = make_groups(config.parallel, config.trainer.seed, config.memory.owners)
        is_logging_rank, device = world.rank == 0, self.device.torch_device
        self.folder = open_run_folder(config, world_size=world.size, device=device, writes=is_logging_rank)
        self.watchdog = Watchdog(self.folder.hangs, world.rank, hang_seconds(config))
        self.ledger = Ledger(self.folder.goodput if is_logging_rank else None, on_phase=self.watchdog.beat)
        self.stream = setup.open_stream(config, "train", is_quiet=not is_logging_rank)
        held_out = setup.open_stream(config, "validation", is_quiet=not is_logging_rank)
        texts = open_texts(config)
        stage = setup.build_stage(config, self.groups, self.device)
        self.engine = setup.build_engine(config, stage, self.device, self.accumulation)
        bins_V = setup.decile_bins(config).to(device)
        self.checkpoints = setup.open_checkpoints(config, self.folder, self.engine, self.stream, bins_V)
        self.exports = Exports(self.folder.path, config.trainer.precision) if is_logging_rank else None
        if self.exports is not None:
            self.checkpoints.tell(self.exports.on_written, self.exports.in_use)
        if is_logging_rank:
            setup.describe(config, self.course, self.stage, self.device, self.stream, held_out)
        with self.ledger.spend("resume"):
            outset = set_out(config, self.course, self.folder, self.checkpoints)
        self.state, self.schedule = outset.state, outset.schedule
        self.has_checkpoint = outset.is_resumed
        self.interrupt = interrupt or Interrupt(catches=False)
        self._host = make_host_group(config.cluster.timeout_minutes)
        self.agreement = Agreement(self.interrupt, self._host)
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
        self.left_out = LeftOut(self.stream, self.batches, self.state, self._host)
        evaluates_again = bool(self.state.extra.get(EVALUATION_DUE))
        # Assumes the current batch size; a rollback does not change it.
        total_steps = self.course.total_steps(self.state)
        self.reporter = Reporter(
            config,
            engine=self.engine,
            device=self.device,
            bins_V=bins_V,
            evaluator=Evaluator(config, self.stage, held_out, bins_V, self.groups, texts),
            guard=self.guard,
            left_out=self.left_out,
            ledger=self.ledger,
            state=self.state,
            total_steps=total_steps,
            loggers=open_loggers(
                config, self.folder, outset, total_steps=total_steps, evaluates_again=evaluates_again
            )
            if is_logging_rank
            else Loggers(),
        )
        self.reactions = Reactions(self.state, self.guard, self.checkpoints, self.ledger, self.reporter)

    @property
    def stage(self) -> TideStage:
        """This process's pipeline stage of the model."""
        return self.engine.module

    @property
    def accumulation(self) -> int:
        """Micro-batches that this rank runs in an optimizer step."""
        trainer = self.config.trainer
        return trainer.global_batch_size // (trainer.micro_batch_size * self.groups.data_size)

    def run(self) -> None:
        """Train from the current position to the end of the run.

        Raises:
            RunStoppedError: asked to stop before the end; a checkpoint has been written.
        """
        if self.course.is_complete(self.state):
            log.info("%s is complete: %d steps done, nothing to train", self.folder.path, self.state.step)
        else:
            if self.world.rank == 0:
                self.folder.mark_unfinished()
            with self.interrupt:
                self._train()
        if self.world.rank == 0:
            self.folder.mark_finished(self.state)

    def _train(self) -> None:
        config, state = self.config, self.state
        stop: str | None = None
        self.watchdog.start()
        self.ledger.enter("other")
        self.ledger.go_back(state.step)
        self.reporter.start()
        if state.extra.get(EVALUATION_DUE):
            self.reporter.evaluate(self.watchdog.beat)
        stride, batches = self._next()
        ahead: Request | None = None
        while stride is not None and stop is None:
            made, done = stride, batches
            logged = made.is_due(config.logging.every)
            lr = self.schedule.rate(state)
            has_gone_back = self._step(made, done, ahead, lr, logged=logged) is Action.ROLL_BACK
            if logged and not has_gone_back:
                self.reporter.look_at_traffic()
            if not self.course.is_complete(state) and not has_gone_back:
                stop = self.agreement.reason()
            if stop is None:
                stride, batches = self._next()
                if stride is not None and config.memory.exchange_ahead:
                    ahead = read_ahead(self.stage, batches)
            if has_gone_back:
                continue
            if logged:
                self.reporter.log_step(lr, done)
            evaluation_due = made.is_due(config.trainer.eval_every)
            if stop is not None:  # the process may be killed soon: the resumed run makes the evaluation
                log.info("%s: saving after step %d, then stopping", stop, state.step)
                self._save(made, evaluation_due=evaluation_due)
            elif evaluation_due:
                self.reporter.evaluate(self.watchdog.beat)
            if stop is None and made.is_due(config.checkpoint.every, at_end=config.checkpoint.at_end):
                self._save(made, export_due=self._is_export_due(made))
        with self.ledger.spend("checkpoint"):
            self.checkpoints.wait()
        self.agreement.close()
        if stop is not None:
            message = f"{stop}: stopped after step {state.step}; the same command continues the run"
            raise RunStoppedError(message)

    def _step(
        self, stride: Stride, batches: list[TokenBatch], ahead: Request | None, lr: float, *, logged: bool
    ) -> Action:
        """Run one optimizer step and handle its faults; return the action that was taken."""
        config, state = self.config, self.state
        productive = self.ledger.productive()
        self.ledger.enter("compute")
        batch = state.batches + 1
        self.guard.begin(batch)
        self.reporter.before_step(logged=logged)
        result = compute_gradients(
            self.engine,
            batches,
            config.trainer.z_loss,
            weights=None if stride.is_full else self.batches.weights(stride.sequences),
            window=config.memory.window,
            ahead=ahead,
            own_time=self.guard.own_time,
        )
        count_step(self.stage.meter, self.stage, config, self.accumulation)
        if logged:
            self.reporter.look_at_gradients()
        verdict = self.guard.update(self.engine, result, lr, batch=batch, can_roll_back=self.has_checkpoint)
        self.ledger.enter("other")
        state.take(stride.sequences, self.course.seq_length)
        self.checkpoints.poll()
        if self.exports is not None:
            self.exports.poll()
        if verdict.is_applied:
            self.reporter.add(result, batches)
        return verdict.action if verdict.reason is None else self.reactions.deal_with(verdict, productive)

    def close(self) -> None:
        """Stop the loader processes, close the logs, release the engine, and write the run's summary."""
        error = sys.exception()
        has_trained = self.ledger.enter("shutdown") != "startup"
        try:
            self.batches.close()
            self.checkpoints.close()
            self.reporter.loggers.close()
            self.engine.close()
            dist.destroy_process_group(self._host)
        finally:
            self.watchdog.close()
            if self.exports is not None:
                if error is None:
                    self.exports.finish()
                else:
                    self.exports.stop()
            if has_trained and self.world.rank == 0:
                self.ledger.write()
                self.reporter.summarise(self.folder, error)

    def _next(self) -> tuple[Stride | None, list[TokenBatch]]:
        """Return the next step and its batches; None if the run is complete."""
        if self.course.is_complete(self.state):
            return None, []
        stride = self.course.next(self.state)
        with self.ledger.spend("data wait"):
            return stride, self.batches.next_step(stride.sequences)

    def _is_export_due(self, made: Stride) -> bool:
        checkpoint = self.config.checkpoint
        every = checkpoint.export_hf_every
        return every is not None and made.is_due(every, at_end=checkpoint.at_end)

    def _save(self, made: Stride, *, evaluation_due: bool = False, export_due: bool = False) -> None:
        """Save after the step just made."""
        state, keep_every = self.state, self.config.checkpoint.keep_every
        with self.ledger.spend("checkpoint"):
            self.reporter.keep()
            state.extra |= {
                FAULTS: self.guard.policy.state(),
                EVALUATION_DUE: evaluation_due,
                SCHEDULE: self.schedule.to_json(),
            }
            state.is_milestone = keep_every is not None and made.is_due(keep_every, at_end=False)
            if export_due and self.exports is not None:
                self.exports.want(state.step)
            self.checkpoints.save(state, disk_is_full=self.guard.injector.is_disk_full(state.batches))
        self.has_checkpoint = True
        self.ledger.mark_saved(state.step)
        self.ledger.write()
