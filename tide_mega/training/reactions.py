"""What a run does after a step that was not as it should be: tell, and go back to a checkpoint if need be."""

import logging
from dataclasses import replace

from tide_mega.checkpoint import Checkpointer, TrainingState
from tide_mega.training.faults.guard import StepGuard
from tide_mega.training.faults.policy import Action, Verdict
from tide_mega.training.goodput import Ledger
from tide_mega.training.reporting import Reporter

log = logging.getLogger(__name__)

FAULTS = "faults"
"""Name under which checkpoints keep what the fault policy must remember."""
EVALUATION_DUE = "evaluation_due"
"""Name under which they say that the step they were made after is still to be evaluated."""
EVENTS = {Action.APPLY: "spike", Action.SKIP: "skipped", Action.ROLL_BACK: "rollback"}


class Reactions:
    """Changes where the run stands: its state, and with it everything that counts steps."""

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
        """Log the step just made, going back to the newest checkpoint first where that is the verdict.

        Collective; `productive` is what the ledger had before the step.

        Returns:
            What was done: the verdict's action, but a skip for a rollback that found no checkpoint.

        Raises:
            DivergedError: it happens more often than `faults` allows.
        """
        at_step = self._state.step
        if verdict.action is Action.SKIP:
            self._ledger.waste(productive)
        self._guard.tell(verdict, at_step)
        if verdict.action is Action.ROLL_BACK and not self._roll_back():
            verdict = replace(verdict, action=Action.SKIP)
            self._ledger.waste(productive)
            counts = self._guard.policy.counts  # where it stands as the rollback that was decided on
            counts.rollbacks -= 1
            counts.skipped_steps += 1
            counts.skipped_in_a_row += 1
            self._guard.tell(verdict, at_step)
        self._reporter.log_event(EVENTS[verdict.action], verdict, at_step)
        return verdict.action

    def _roll_back(self) -> bool:
        """Load the newest checkpoint, but go on with the data that comes next; whether there was one."""
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
