"""Guards each optimizer step: injects faults before it, then takes the vote and verdict on its update.

`Injector` causes the faults that `faults.inject` names and logs each when it strikes.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tide_mega.config.schema import FaultConfig
from tide_mega.config.validate import KINDS, Injection, parse_injection
from tide_mega.errors import DataError
from tide_mega.model.steps import StepResult
from tide_mega.parallel.device import Device
from tide_mega.parallel.engine import Engine
from tide_mega.training.faults.policy import Action, FaultPolicy, Verdict, describe, take_vote
from tide_mega.training.faults.stragglers import OwnTime, StragglerReport, Stragglers, gather_places

log = logging.getLogger(__name__)

_SPIKE = 10.0


class Injector:
    """Injects the faults of one rank; does nothing if there are none.

    Faults are placed by the number of the data batch, so one that a rollback has passed does not strike again, and
    one on a batch that a resumed run reads again does. `kill`, `hang` and `disk_full` first leave a marker file in
    the run folder and strike once; otherwise no restart would get past them.
    """

    def __init__(self, texts: Sequence[str], rank: int, marks: Path) -> None:
        """Take `faults.inject`, this rank, and the folder for the marker files."""
        self._marks, self._rank = marks, rank
        every = [parse_injection(text) for text in texts]
        self._mine = [one for one in every if one.rank is None or one.rank == rank]
        for one in self._mine:
            log.warning("FAULT INJECTION (faults.inject): %s: %s", one.text, KINDS[one.kind])

    def before(self, batch: int) -> None:
        """Inject the faults due at the beginning of the step on batch number `batch`.

        Raises:
            DataError: a bad shard is injected.
        """
        for one in self._due("kill", batch):
            if self._is_first(one):
                os.kill(os.getpid(), signal.SIGKILL)
        for one in self._due("hang", batch):
            if self._is_first(one):
                threading.Event().wait()
        if self._due("bad_shard", batch):
            raise DataError(f"a shard cannot be read at batch {batch} (injected by faults.inject)")

    def is_slow(self, batch: int) -> bool:
        """Return whether this rank is to be slowed down."""
        return any(one.kind == "slow" and batch >= one.step for one in self._mine)

    def slow_down(self, batch: int) -> None:
        """Sleep for the extra time of a slow rank."""
        time.sleep(sum(one.seconds for one in self._mine if one.kind == "slow" and batch >= one.step))

    def spoil(self, result: StepResult, engine: Engine, batch: int) -> StepResult:
        """Apply the faults due to the step's gradients, and return its sums with the faults applied."""
        if self._due("nan_grad", batch):
            engine.poison_gradient()
        factor = 1.0
        if self._due("nan_loss", batch):
            factor = float("nan")
        elif self._due("spike", batch):
            factor = _SPIKE
        return result if factor == 1.0 else replace(result, loss_sum=result.loss_sum * factor)

    def is_disk_full(self, batch: int) -> bool:
        """Return whether the checkpoint after batch `batch` is to fail: the first from the fault's batch on."""
        due = [one for one in self._mine if one.kind == "disk_full" and one.step <= batch]
        self._mine = [one for one in self._mine if one not in due]
        first = [one for one in due if self._is_first(one)]
        for one in first:
            log.warning("FAULT INJECTION: %s strikes", one.text)
        return bool(first)

    def _due(self, kind: str, batch: int) -> list[Injection]:
        due = [one for one in self._mine if one.kind == kind and one.step == batch]
        for one in due:
            log.warning("FAULT INJECTION: %s strikes", one.text)
        return due

    def _is_first(self, one: Injection) -> bool:
        mark = self._marks / f"{one.text.replace(':', '-')}.rank-{self._rank}"
        if mark.exists():
            log.warning("FAULT INJECTION: %s has struck before in this run folder, and is left out", one.text)
            return False
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
        return True


class StepGuard:
    """Decides whether each step is applied, skipped or rolled back; all ranks call it and decide alike."""

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
        """Set up policy, stopwatch, fault injection and straggler detection; collective over the world.

        Args:
            config: the faults section.
            device: on which the steps are computed.
            rank: of this process.
            replica: its data-parallel replica.
            run_folder: for the marker files of injected faults that strike once.
            state: `policy.state()` from the checkpoint resumed from; empty in a new run.
        """
        self.policy = FaultPolicy(config, state)
        self.own_time = OwnTime(device)
        self.injector = Injector(config.inject, rank, run_folder / "injected")
        self._stragglers = Stragglers(gather_places(replica), config.straggler_ratio)
        self._named: list[list[int]] = []
        self._is_logging_rank = rank == 0  # every rank reaches the same result

    def begin(self, batch: int) -> None:
        """Inject the faults due before the step on batch number `batch` of the training data, from 1."""
        self.injector.before(batch)
        if self.injector.is_slow(batch):
            with self.own_time:
                self.injector.slow_down(batch)

    def update(
        self, engine: Engine, result: StepResult, lr: float, *, batch: int, can_roll_back: bool
    ) -> Verdict:
        """Apply a step's gradients or drop them, according to the vote of all ranks; collective over the world.

        Args:
            engine: holds the reduced gradients.
            result: this rank's sums of the step.
            lr: learning rate of the update.
            batch: number of the step's batch, from 1.
            can_roll_back: whether there is a checkpoint to roll back to; the same on every rank.
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
        """Log the fault of a step, if any, and raise if the run has diverged.

        Raises:
            DivergedError: too many steps skipped in a row, or too many rollbacks.
        """
        if verdict.reason is not None and self._is_logging_rank:
            done = {
                Action.APPLY: "applied all the same",
                Action.SKIP: "skipped: nothing is updated, the data goes on",
                Action.ROLL_BACK: "going back to the newest checkpoint and on with the data that follows",
            }[verdict.action]
            log.warning("step %d: %s; %s", step, describe(verdict), done)
        self.policy.stop_if_hopeless(step, verdict)

    def stragglers(self) -> StragglerReport:
        """Report on the steps since the last call; logs slow replicas unless the last report named the same."""
        report = self._stragglers.report()
        named = [replica.ranks for replica in report.slow]
        if named and named != self._named and self._is_logging_rank:
            log.warning("slow: %s", "; ".join(map(str, report.slow)))
        self._named = named
        return report
