"""One small all-gather before each update, from which every rank reads the same and decides the same.

The optimizer makes the host wait for the device before it updates (it looks at the gradient norm), so the vote,
right before it, moves that wait and adds none.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from tide_mega.model.passes import StepResult

_COLUMNS = 5


@dataclass(frozen=True)
class Vote:
    """What all ranks say of a step, before its update."""

    is_loss_finite: bool
    """On every rank that computed one, and of some token at all."""
    is_gradient_finite: bool
    """In every rank's share, replicated weights' copies included."""
    loss: float
    """Mean cross entropy of the step in nats over the ranks where it is finite; NaN where it is on none."""
    seconds_by_rank: list[float]
    """Each rank's own computing time, as it measured it."""


def take_vote(result: StepResult, is_gradient_finite: Tensor, seconds: float) -> Vote:
    """Gather every rank's view of the step; collective over the world, and the host waits for the device.

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
