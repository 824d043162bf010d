"""Losses of the applied steps since the last log line, whole and by decile.

Shapes: B sequences, T tokens, V vocabulary, S slots.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tide_mega.checkpoint import TrainingState
from tide_mega.data.batch import TokenBatch
from tide_mega.metrics.deciles import DecileResult
from tide_mega.metrics.exact_deciles import ExactDecileLoss
from tide_mega.model.passes import StepResult
from tide_mega.parallel.groups import ParallelGroups, sum_over

BY_DECILE = "loss_by_decile"
"""Name under which checkpoints keep the sums by decile."""


@dataclass(frozen=True)
class WindowMeans:
    """Means over the tokens of the window's applied steps, over all ranks; NaN where there were none."""

    loss: float
    z_loss: float
    deciles: DecileResult | None
    """None without diagnostics."""


class LossWindow:
    """Sums on this rank's device; nothing waits for them but `means` and `keep`."""

    def __init__(
        self, z_loss: float, groups: ParallelGroups, bins_V: Tensor, *, by_decile: bool, speaks: bool
    ) -> None:
        """Begin a window of no steps.

        Args:
            z_loss: weight of the z-loss.
            groups: over whose data and pipeline parallelism the sums go.
            bins_V: decile of each type, on the device.
            by_decile: whether to sum by decile too.
            speaks: whether this rank takes in what a checkpoint holds: one rank of the world.
        """
        self._z_loss, self._groups, self._speaks = z_loss, groups, speaks
        # [cross entropy, weighted z-loss, tokens]
        self._sums = torch.zeros(3, dtype=torch.float64, device=bins_V.device)
        self._deciles = ExactDecileLoss(bins_V) if by_decile else None
        self.first_step = 1
        """First step that the sums by decile count."""

    def add(self, result: StepResult, batches: list[TokenBatch]) -> None:
        """Take in an applied step, and the microbatches it was made of."""
        z_loss = self._z_loss * result.z_square_sum
        self._sums += torch.stack([result.loss_sum.double(), z_loss.double(), result.tokens.double()])
        if self._deciles is not None and result.cross_entropies:  # only the last pipeline stage has them
            for loss_BT, batch in zip(result.cross_entropies, batches, strict=True):
                self._deciles.update(loss_BT, batch.labels_BT)

    def means(self) -> WindowMeans:
        """Average over the tokens of all ranks; collective."""
        loss_sum, z_loss_sum, tokens = self._over_ranks(self._sums.clone()).tolist()
        return WindowMeans(
            loss=loss_sum / tokens if tokens else math.nan,
            z_loss=z_loss_sum / tokens if tokens else math.nan,
            deciles=None if self._deciles is None else self._deciles.reduce(self._over_ranks),
        )

    def restart(self, step: int) -> None:
        """Begin a new window, with `step` steps done."""
        self._sums.zero_()
        self.first_step = step + 1
        if self._deciles is not None:
            self._deciles.reset()

    def keep(self, state: TrainingState) -> None:
        """Put the sums over all ranks into what a checkpoint keeps; collective."""
        state.loss_sum, state.z_loss_sum, tokens = self._over_ranks(self._sums.clone()).tolist()
        state.window_tokens = int(tokens)
        state.extra.pop(BY_DECILE, None)
        if self._deciles is not None:
            sum_S, count_S = self._deciles.reduced(self._over_ranks)
            kept = {"first_step": self.first_step, "sum": sum_S.tolist(), "count": count_S.tolist()}
            state.extra[BY_DECILE] = kept

    def restore(self, state: TrainingState) -> None:
        """Go on from what a checkpoint kept; one from without diagnostics has no sums by decile."""
        self.restart(state.step)
        if self._speaks:
            values = [state.loss_sum, state.z_loss_sum, state.window_tokens]
            self._sums += self._sums.new_tensor(values)
        if self._deciles is not None and (kept := state.extra.get(BY_DECILE)) is not None:
            self.first_step = kept["first_step"]
            if self._speaks:
                self._deciles.sum += self._deciles.sum.new_tensor(kept["sum"])
                self._deciles.count += self._deciles.count.new_tensor(kept["count"])

    def _over_ranks(self, tensor: Tensor) -> Tensor:
        return sum_over(self._groups.pipeline, sum_over(self._groups.data, tensor))
