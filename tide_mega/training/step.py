"""One optimizer step's gradients, and one evaluation pass: the memory around megatron's schedule.

Shapes: B sequences, T tokens, L layers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tide_mega.data.batch import TokenBatch
from tide_mega.memory.plan import plan_rows
from tide_mega.model.memory import MemoryStep
from tide_mega.model.tide import TideModel
from tide_mega.parallel.engine import Engine
from tide_mega.parallel.pipeline import LossFunction, run_microbatches
from tide_mega.training.loss import token_loss


@dataclass(frozen=True)
class Microbatch:
    """What one forward pass takes: tokens, labels and, with K > 0, each token's row on the board."""

    tokens_BT: Tensor
    labels_BT: Tensor
    index_BT: Tensor | None

    @property
    def micro_batch_size(self) -> int:
        """B."""
        return self.tokens_BT.size(0)


@dataclass
class StepResult:
    """Sums over the tokens this rank computed in a step; still on the device, nothing waits for them."""

    loss_sum: Tensor
    z_square_sum: Tensor
    tokens: Tensor


def compute_gradients(engine: Engine, batches: list[TokenBatch], z_loss: float) -> StepResult:
    """Run forward and backward of all microbatches of a step; leaves reduced gradients with the engine.

    The memory is read once before the schedule and its gradient returns once after it, so the schedule,
    recompute and the traffic between pipeline stages do not know that it exists.
    """
    model: TideModel = engine.module
    model.train()
    with engine.accumulate():
        microbatches, reading = _read_memory(model, batches, engine)
        results = run_microbatches(
            partial(_forward_step, call=engine, z_loss=z_loss),
            microbatches,
            model,
            seq_length=batches[0].tokens_BT.size(1),
        )
        if reading is not None:
            reading.send_gradients(model.groups.tensor, partial=model.config.sequence_parallel)
    return StepResult(
        loss_sum=torch.stack([result["cross_entropy"].sum() for result in results]).sum(),
        z_square_sum=torch.stack([result["z_square"] for result in results]).sum(),
        tokens=torch.stack([result["count"] for result in results]).sum(),
    )


@dataclass(frozen=True)
class EvaluatedBatch:
    """Per-token results of one evaluated microbatch."""

    tokens_BT: Tensor
    labels_BT: Tensor
    cross_entropy_BT: Tensor
    null_weight_LBT: Tensor | None


@torch.no_grad()
def evaluate_batch(model: TideModel, batch: TokenBatch) -> EvaluatedBatch:
    """Run one microbatch forward, keeping every token's cross entropy and null-bank weights."""
    model.eval()
    model.board.null_weights_L = {} if model.memory is not None else None
    microbatches, reading = _read_memory(model, [batch], model)
    (result,) = run_microbatches(
        partial(_forward_step, call=model, z_loss=0.0),
        microbatches,
        model,
        seq_length=batch.tokens_BT.size(1),
        forward_only=True,
    )
    null_weight_LBT = None
    if reading is not None:
        null_weight_LBT = model.null_weights()
        reading.close()
    model.board.null_weights_L = None
    return EvaluatedBatch(batch.tokens_BT, batch.labels_BT, result["cross_entropy"], null_weight_LBT)


def _read_memory(
    model: TideModel, batches: list[TokenBatch], call: "Engine | TideModel"
) -> tuple[list[Microbatch], MemoryStep | None]:
    if model.memory is None:
        return [Microbatch(*batch, None) for batch in batches], None
    plan = plan_rows([batch.tokens_BT for batch in batches])
    reading = MemoryStep(call(read_ids=plan.ids_U), model.board)
    microbatches = [Microbatch(*batch, index) for batch, index in zip(batches, plan.index_MBT, strict=True)]
    return microbatches, reading


def _forward_step(
    microbatches: Iterator[Microbatch], _: nn.Module, *, call: "Engine | TideModel", z_loss: float
) -> tuple[Tensor, LossFunction]:
    microbatch = next(microbatches)
    output = call(microbatch.tokens_BT, microbatch.labels_BT, microbatch.index_BT)
    return output, partial(token_loss, labels_BT=microbatch.labels_BT, z_loss=z_loss)
