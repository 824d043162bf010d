"""Around each optimizer step: injected faults before it, the vote and the verdict on its update."""

import logging
from pathlib import Path
from typing import Any

from tide_mega.config.schema import FaultConfig
from tide_mega.model.passes import StepResult
from tide_mega.parallel.device import Device
from tide_mega.parallel.engine import Engine
from tide_mega.training.faults.injector import Injector
from tide_mega.training.faults.own_time import OwnTime
from tide_mega.training.faults.policy import Action, FaultPolicy, Verdict, describe
from tide_mega.training.faults.straggler import StragglerReport, Stragglers, gather_places
from tide_mega.training.faults.vote import take_vote

log = logging.getLogger(__name__)


class StepGuard:
    """Decides what becomes of each step; every rank calls it and every rank decides alike."""

    def __init__(
        self,
        config: FaultConfig,
        device: Device,
        *,
        rank: int,
        replica: int,
        run_folder: Path,
        state: dict[str, Any],
    ) -> None:
        """Collective over the world.

        Args:
            config: the faults section.
            device: where the steps are computed.
            rank: this process.
            replica: its data-parallel replica.
            run_folder: for the marks of injected faults that strike once.
            state: what `policy.state()` gave in the checkpoint resumed from; empty in a new run.
        """
        self.policy = FaultPolicy(config, state)
        self.own_time = OwnTime(device)
        self.injector = Injector(config.inject, rank, run_folder / "injected")
        self._stragglers = Stragglers(gather_places(replica), config.straggler_ratio)
        self._named: list[list[int]] = []
        self._speaks = rank == 0  # every rank finds the same

    def begin(self, batch: int) -> None:
        """Before a step on batch number `batch` of the training data, counted from 1."""
        self.injector.before(batch)
        if self.injector.is_slow(batch):
            with self.own_time:
                self.injector.slow_down(batch)

    def update(
        self, engine: Engine, result: StepResult, lr: float, *, batch: int, can_roll_back: bool
    ) -> Verdict:
        """Apply a step's gradients, or drop them, as all ranks' vote has it; collective over the world.

        Args:
            engine: holds the reduced gradients.
            result: this rank's sums of the step.
            lr: learning rate of the update.
            batch: number of the step's batch, from 1.
            can_roll_back: whether there is a checkpoint to go back to; the same on every rank.
        """
        result = self.injector.spoil(result, engine, batch)
        vote = take_vote(result, engine.is_gradient_finite(), self.own_time.take())
        self._stragglers.add(vote.seconds_by_rank)
        verdict = self.policy.judge(vote, can_roll_back=can_roll_back)
        if not verdict.is_applied:
            engine.skip()
        elif not engine.step(lr):  # finite values whose norm is not
            verdict = Verdict(Action.SKIP, "gradient", vote.loss)
        self.policy.count(verdict)
        return verdict

    def tell(self, verdict: Verdict, step: int) -> None:
        """Log what was wrong with a step, and stop where it is hopeless.

        Raises:
            DivergedError: too many steps were skipped in a row, or too many rollbacks made.
        """
        if verdict.reason is not None and self._speaks:
            done = {
                Action.APPLY: "applied all the same",
                Action.SKIP: "skipped: nothing is updated, the data goes on",
                Action.ROLL_BACK: "going back to the newest checkpoint and on with the data that follows",
            }[verdict.action]
            log.warning("step %d: %s; %s", step, describe(verdict), done)
        self.policy.stop_if_hopeless(step, verdict)

    def stragglers(self) -> StragglerReport:
        """Report on the steps since the last call; a slow replica is logged unless it was named before."""
        report = self._stragglers.report()
        named = [replica.ranks for replica in report.slow]
        if named and named != self._named and self._speaks:
            log.warning("slow: %s", "; ".join(map(str, report.slow)))
        self._named = named
        return report
