"""Decides by a vote of all ranks whether a step is applied, skipped or rolled back, and when a run must stop.

Before each update one small all-gather gives every rank the same view of the step, so that all decide alike. The
optimizer makes the host wait for the device before it updates anyway (it reads the gradient norm), so the vote,
right before it, moves that wait and adds none. A loss spike is judged by a robust z-score against the last applied
steps.

Dimensions: W ranks of the world, C columns of the vote.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tide_mega.config.schema import FaultConfig
from tide_mega.errors import Exit, StatedError
from tide_mega.model.steps import StepResult

_NORMAL = 1.4826
"""Standard deviation over median absolute deviation (MAD), for normal noise."""
_FLOOR = 1e-3
"""Lower bound of the scale as a fraction of the median: if the loss hardly varies, 0.1 % is no spike."""

_COLUMNS = 5
ADVICE = (
    "the newest checkpoint is from before; lower optim.lr, raise optim.warmup_steps, or look at the data that "
    "follows it"
)


class SpikeWindow:
    """The losses of the last applied steps."""

    def __init__(self, size: int, losses: Iterable[float] = ()) -> None:
        """Take the number of steps to judge by and the losses known so far, oldest first."""
        self._size = size
        self._losses: deque[float] = deque(losses, maxlen=size)

    @property
    def losses(self) -> list[float]:
        """The losses in the window, oldest first."""
        return list(self._losses)

    def add(self, loss: float) -> None:
        """Add the loss of an applied step."""
        self._losses.append(loss)

    def z_score(self, loss: float) -> float | None:
        """Return (loss - median) / (1.4826 MAD); None until the window is full, and for a loss that is not finite.

        MAD is the median distance from the median; the denominator is at least `_FLOOR` times the median.
        """
        if len(self._losses) < self._size or not math.isfinite(loss):
            return None
        median = statistics.median(self._losses)
        deviation = statistics.median(abs(known - median) for known in self._losses)
        return (loss - median) / max(_NORMAL * deviation, _FLOOR * abs(median), 1e-12)


@dataclass(frozen=True)
class Vote:
    """The combined view of all ranks on a step before its update."""

    is_loss_finite: bool
    """Whether the loss is finite on every rank that computed one, and there was at least one token."""
    is_gradient_finite: bool
    """Whether every rank's share of the gradient is finite, including copies of replicated weights."""
    loss: float
    """Mean cross entropy of the step in nats over the ranks where it is finite; NaN if it is on none."""
    seconds_by_rank: list[float]
    """Each rank's own computing time, as it measured it."""


def take_vote(result: StepResult, is_gradient_finite: Tensor, seconds: float) -> Vote:
    """Gather every rank's view of the step; collective over the world, and waits for the device.

    Args:
        result: this rank's sums.
        is_gradient_finite: 0-d, of this rank's share of the reduced gradient.
        seconds: this rank's own computing time.
    """
    finite = torch.isfinite(result.loss_sum.double() + result.z_square_sum.double())
    mine = torch.stack(
        [
            finite.double(),
            is_gradient_finite.double(),
            torch.where(finite, result.loss_sum.double(), 0.0),
            torch.where(finite, result.tokens.double(), 0.0),
            torch.full_like(result.loss_sum, seconds, dtype=torch.float64),
        ]
    )
    world = dist.get_world_size()
    all_WC = mine.new_empty(world, _COLUMNS)
    dist.all_gather_into_tensor(all_WC.view(-1), mine)
    finite_W, gradient_W, loss_W, tokens_W, seconds_W = all_WC.t().tolist()
    tokens = math.fsum(tokens_W)
    return Vote(
        is_loss_finite=all(finite_W) and tokens > 0,
        is_gradient_finite=all(gradient_W),
        loss=math.fsum(loss_W) / tokens if tokens else math.nan,
        seconds_by_rank=seconds_W,
    )


class DivergedError(StatedError, RuntimeError):
    """Loss or gradient were faulty more often than the configuration allows."""

    exit_status = Exit.DIVERGED


class Action(Enum):
    """What to do with the gradients of a step."""

    APPLY = "apply"
    SKIP = "skip"
    ROLL_BACK = "roll back"


_ON_SPIKE = {"log": Action.APPLY, "skip": Action.SKIP, "rollback": Action.ROLL_BACK}


@dataclass(frozen=True)
class Verdict:
    """The decision on a step; the same on every rank."""

    action: Action
    reason: str | None
    """loss or gradient (not finite), spike, or None if nothing is wrong."""
    loss: float
    """Mean over the step's tokens, on the ranks where it is finite."""
    z_score: float | None = None
    """Robust standard deviations above the median of the last applied steps; None until there are enough."""

    @property
    def is_applied(self) -> bool:
        """Whether the weights are updated."""
        return self.action is Action.APPLY


@dataclass
class FaultState:
    """State kept in checkpoints, so that a resumed run decides as the uninterrupted one would."""

    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    spikes: int = 0
    rollbacks: int = 0
    losses: list[float] = field(default_factory=list)
    """Losses of the last applied steps, oldest first."""


class FaultPolicy:
    """Decides, counts and stops, using nothing but votes, so that every rank comes to the same result."""

    def __init__(self, config: FaultConfig, state: dict[str, Any] | None = None) -> None:
        """Take the configuration, and the result of `state` when the run was saved."""
        self.config = config
        self.counts = FaultState(**(state or {}))
        self._window = SpikeWindow(config.spike_window, self.counts.losses)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as plain numbers."""
        return asdict(self.counts) | {"losses": self._window.losses}

    def judge(self, vote: Vote, *, can_roll_back: bool) -> Verdict:
        """Decide what to do with a step's gradients; does not count it yet."""
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
        """Count a step and what was done with it."""
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
        """Restore a checkpoint's window of losses; the counters keep what has happened since."""
        self.counts.skipped_in_a_row = 0
        self._window = SpikeWindow(self.config.spike_window, saved.get("losses", ()))

    def stop_if_hopeless(self, step: int, verdict: Verdict) -> None:
        """Raise if continuing is pointless.

        Raises:
            DivergedError: too many steps skipped in a row, or too many rollbacks.
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
    """Return what was wrong with a step, as a clause."""
    if verdict.reason == "spike":
        return (
            f"the loss spikes: {verdict.loss:.4f}, {verdict.z_score:.1f} robust deviations above the median"
        )
    return f"the {verdict.reason} is not finite"
