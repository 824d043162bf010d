"""What becomes of a step: applied, skipped, or rolled back; and when the run has to stop."""

from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from tide_mega.config.errors import StatedError
from tide_mega.config.exits import Exit
from tide_mega.config.schema import FaultConfig
from tide_mega.training.faults.spike import SpikeWindow
from tide_mega.training.faults.vote import Vote

ADVICE = (
    "the newest checkpoint is from before; lower optim.lr, raise optim.warmup_steps, or look at the data that "
    "follows it"
)


class DivergedError(StatedError, RuntimeError):
    """The loss or its gradient went wrong more often than the configuration allows."""

    exit_status = Exit.DIVERGED


class Action(Enum):
    """What is done with the gradients of a step."""

    APPLY = "apply"
    SKIP = "skip"
    ROLL_BACK = "roll back"


_ON_SPIKE = {"log": Action.APPLY, "skip": Action.SKIP, "rollback": Action.ROLL_BACK}


@dataclass(frozen=True)
class Verdict:
    """What becomes of a step; the same on every rank."""

    action: Action
    reason: str | None
    """loss or gradient (not finite), spike, or None where nothing is wrong."""
    loss: float
    """Mean over the step's tokens; of the ranks where it is finite."""
    z_score: float | None = None
    """Robust standard deviations above the median of the last applied steps; None until there are enough."""

    @property
    def is_applied(self) -> bool:
        """Whether the weights were updated."""
        return self.action is Action.APPLY


@dataclass
class FaultState:
    """What must be kept in checkpoints, so that a resumed run decides as the uninterrupted one."""

    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    spikes: int = 0
    rollbacks: int = 0
    losses: list[float] = field(default_factory=list)
    """Of the last applied steps, oldest first."""


class FaultPolicy:
    """Decides, counts and stops, from votes alone: every rank comes to the same."""

    def __init__(self, config: FaultConfig, state: dict[str, Any] | None = None) -> None:
        """Take the configuration, and what `state` gave when the run was saved."""
        self.config = config
        self.counts = FaultState(**(state or {}))
        self._window = SpikeWindow(config.spike_window, self.counts.losses)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; plain numbers."""
        return asdict(self.counts) | {"losses": self._window.losses}

    def judge(self, vote: Vote, *, can_roll_back: bool) -> Verdict:
        """Decide what to do with a step's gradients; counts nothing yet."""
        if not vote.is_loss_finite:
            return Verdict(Action.SKIP, "loss", vote.loss)
        if not vote.is_gradient_finite:
            return Verdict(Action.SKIP, "gradient", vote.loss)
        z_score = self._window.z_score(vote.loss)
        if z_score is None or z_score < self.config.spike_z:
            return Verdict(Action.APPLY, None, vote.loss, z_score)
        action = _ON_SPIKE[self.config.on_spike]
        if action is Action.ROLL_BACK and not can_roll_back:
            action = Action.SKIP
        return Verdict(action, "spike", vote.loss, z_score)

    def count(self, verdict: Verdict) -> None:
        """Take note of what was done."""
        counts = self.counts
        counts.spikes += verdict.reason == "spike"
        if verdict.is_applied:
            counts.skipped_in_a_row = 0
            self._window.add(verdict.loss)
        elif verdict.action is Action.SKIP:
            counts.skipped_steps += 1
            counts.skipped_in_a_row += 1
        else:
            counts.rollbacks += 1

    def rewind(self, saved: dict[str, Any]) -> None:
        """Go back to a checkpoint's losses; what was counted since has happened and stays counted."""
        self.counts.skipped_in_a_row = 0
        self._window = SpikeWindow(self.config.spike_window, saved.get("losses", ()))

    def stop_if_hopeless(self, step: int, verdict: Verdict) -> None:
        """Raise where going on is no use.

        Raises:
            DivergedError: too many steps were skipped in a row, or too many rollbacks made.
        """
        counts, config = self.counts, self.config
        if counts.skipped_in_a_row >= config.max_skipped_in_a_row:
            raise DivergedError(
                f"{counts.skipped_in_a_row} steps in a row were skipped (faults.max_skipped_in_a_row), the last "
                f"because {describe(verdict)} at step {step}: {ADVICE}"
            )
        if counts.rollbacks > config.max_rollbacks:
            raise DivergedError(
                f"{describe(verdict)} at step {step}, after {config.max_rollbacks} rollbacks "
                f"(faults.max_rollbacks): {ADVICE}, or set faults.on_spike=log"
            )


def describe(verdict: Verdict) -> str:
    """What was wrong with a step, as a clause."""
    if verdict.reason == "spike":
        return (
            f"the loss spikes: {verdict.loss:.4f}, {verdict.z_score:.1f} robust deviations above the median"
        )
    return f"the {verdict.reason} is not finite"
