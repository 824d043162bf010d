"""One optimizer step's gradients, and one evaluation pass: the memory around megatron's schedule.

Shapes: B sequences, T tokens, L layers.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tide_mega.data.batch import TokenBatch
from tide_mega.memory.owned import Fetch
from tide_mega.memory.plan import MemoryPlan, plan_rows
from tide_mega.model.reading import MemoryReading
from tide_mega.model.stage import TideStage
from tide_mega.model.tide import LossTensors, Targets
from tide_mega.parallel.engine import Engine
from tide_mega.parallel.pipeline import LossFunction, run_microbatches


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


def compute_gradients(
    engine: Engine,
    batches: list[TokenBatch],
    z_loss: float,
    *,
    window: int | None = None,
    ahead: "Ahead | None" = None,
    own_time: AbstractContextManager[object] | None = None,
) -> StepResult:
    """Run forward and backward of all microbatches of a step; leaves reduced gradients with the engine.

    The memory is read once before the schedule and its gradient returns once after it, so the schedule,
    recompute and the traffic between pipeline stages do not know that it exists.

    Args:
        engine: model and optimizer.
        batches: this replica's microbatches, on every rank that shares the replica.
        z_loss: weight of the z-loss.
        window: microbatches served by one reading; None means all.
        ahead: the first reading's rows, already under way.
        own_time: entered around what this replica computes by itself.
    """
    stage: TideStage = engine.module
    stage.train()
    size = window or len(batches)
    results: list[dict[str, Tensor]] = []
    with engine.accumulate():
        for first in range(0, len(batches), size):
            served = batches[first : first + size]
            microbatches, reading = _read_memory(stage, served, engine, ahead if first == 0 else None)
            step = partial(_forward_step, call=engine, z_loss=z_loss, share=len(served) / len(batches))
            with own_time or nullcontext():
                results += run_microbatches(
                    step, microbatches, list(stage.chunks), seq_length=served[0].tokens_BT.size(1)
                )
            if reading is not None:
                reading.send_gradients()
    return _sums(results, batches[0].tokens_BT.device)


def _sums(results: list[dict[str, Tensor]], device: torch.device) -> StepResult:
    """Add up the microbatches; only the last pipeline stage has any."""
    if not results:
        zero = torch.zeros((), device=device)
        return StepResult(zero, zero, zero)
    return StepResult(
        loss_sum=torch.stack([result["cross_entropy"].sum() for result in results]).sum(),
        z_square_sum=torch.stack([result["z_square"] for result in results]).sum(),
        tokens=torch.stack([result["count"] for result in results]).sum(),
    )


@dataclass(frozen=True)
class Ahead:
    """A reading begun before its step: the plan, and rows under way where an owner sends them."""

    plan: MemoryPlan
    fetch: Fetch | None


def read_ahead(stage: TideStage, batches: list[TokenBatch]) -> Ahead | None:
    """Plan the next step's reading and start moving its rows; after the tables have been updated."""
    if stage.num_blocks == 0:
        return None
    plan = plan_rows([batch.tokens_BT for batch in batches])
    return Ahead(plan, stage.owned.fetch(plan.ids_U) if stage.owned is not None else None)


@dataclass(frozen=True)
class EvaluatedBatch:
    """Per-token results of one evaluated microbatch."""

    tokens_BT: Tensor
    labels_BT: Tensor
    cross_entropy_BT: Tensor | None
    """None except on the last pipeline stage."""
    null_weight_LBT: Tensor | None


@torch.no_grad()
def evaluate_batches(stage: TideStage, batches: list[TokenBatch]) -> list[EvaluatedBatch]:
    """Run microbatches forward, keeping every token's cross entropy and null-bank weights.

    The interleaved schedule takes as many microbatches at a time as there are stages.
    """
    stage.eval()
    stage.board.null_weights_L = {} if stage.num_blocks else None
    microbatches, reading = _read_memory(stage, batches, stage, None)
    results = run_microbatches(
        partial(_forward_step, call=stage, z_loss=0.0, share=1.0),
        microbatches,
        list(stage.chunks),
        seq_length=batches[0].tokens_BT.size(1),
        forward_only=True,
    )
    null_weights: list[Tensor | None] = [None] * len(batches)
    if reading is not None:
        null_weights = list(stage.null_weights().split(batches[0].tokens_BT.size(0), dim=1))
        reading.close()
    stage.board.null_weights_L = None
    losses: list[Tensor | None] = [result["cross_entropy"] for result in results]
    losses = losses or [None] * len(batches)
    return [
        EvaluatedBatch(*batch, loss, null)
        for batch, loss, null in zip(batches, losses, null_weights, strict=True)
    ]


def _read_memory(
    stage: TideStage, batches: list[TokenBatch], call: "Engine | TideStage", ahead: Ahead | None
) -> tuple[list[Microbatch], MemoryReading | None]:
    if stage.num_blocks == 0:
        return [Microbatch(*batch, None) for batch in batches], None
    plan = ahead.plan if ahead else plan_rows([batch.tokens_BT for batch in batches])
    reading = MemoryReading(stage, call, plan.ids_U, ahead.fetch if ahead else None)
    microbatches = [Microbatch(*batch, index) for batch, index in zip(batches, plan.index_MBT, strict=True)]
    return microbatches, reading


def _forward_step(
    microbatches: Iterator[Microbatch],
    chunk: nn.Module,
    *,
    call: "Engine | TideStage",
    z_loss: float,
    share: float,
) -> tuple[Tensor, LossFunction]:
    microbatch = next(microbatches)
    virtual = getattr(chunk, "vp_stage", None) or 0
    targets = Targets(microbatch.labels_BT, z_loss)
    output = call(virtual, microbatch.tokens_BT, targets, microbatch.index_BT)
    return output, partial(_loss_and_sums, share=share)


def _loss_and_sums(output: LossTensors, share: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Weigh a microbatch's loss by the part of the step that the running schedule averages over."""
    loss, cross_entropy_BT, z_square, count = output
    return share * loss, {"cross_entropy": cross_entropy_BT, "z_square": z_square, "count": count}
