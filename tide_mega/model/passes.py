"""One optimizer step's gradients, and one evaluation pass: the memory around megatron's schedule.

Shapes: B sequences, T tokens, L layers.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tide_mega.data.batch import TokenBatch
from tide_mega.kernels.row_gradient import RowGradient
from tide_mega.memory.owned import Fetch
from tide_mega.memory.plan import MemoryPlan, plan_rows
from tide_mega.model.reading import MemoryReading
from tide_mega.model.stage import TideStage
from tide_mega.model.tide import LossTensors, Scored, ScoreTensors, Targets
from tide_mega.parallel.engine import Engine
from tide_mega.parallel.pipeline import LossFunction, run_microbatches


@dataclass(frozen=True)
class Microbatch:
    """What one forward pass takes: tokens, labels and, with K > 0, each token's row on the board."""

    tokens_BT: Tensor
    labels_BT: Tensor
    index_BT: Tensor | None
    weight: float = 1.0
    """Of its mean loss in the step's, relative to that of a microbatch in a full batch."""

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
    cross_entropies: list[Tensor]
    """Of each microbatch [B, T] in nats, 0 where unlabelled; empty except on the last pipeline stage."""


def compute_gradients(
    engine: Engine,
    batches: list[TokenBatch],
    z_loss: float,
    *,
    weights: Sequence[float] | None = None,
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
        weights: of each microbatch's mean loss, where a batch is not full (`StepBatches.weights`).
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
            if weights is not None:
                of_served = zip(microbatches, weights[first : first + size], strict=True)
                microbatches = [replace(microbatch, weight=weight) for microbatch, weight in of_served]
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
        return StepResult(zero, zero, zero, [])
    return StepResult(
        loss_sum=torch.stack([result["cross_entropy"].sum() for result in results]).sum(),
        z_square_sum=torch.stack([result["z_square"] for result in results]).sum(),
        tokens=torch.stack([result["count"] for result in results]).sum(),
        cross_entropies=[result["cross_entropy"] for result in results],
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
    plan = plan_for(stage, batches)
    return Ahead(plan, stage.owned.fetch(plan) if stage.owned is not None else None)


def plan_for(stage: TideStage, batches: list[TokenBatch]) -> MemoryPlan:
    """Plan one reading of the memory for these microbatches; collective over the owners of its rows."""
    owners = stage.owned.owners if stage.owned is not None else None
    return plan_rows([batch.tokens_BT for batch in batches], stage.vocab_size, owners)


@dataclass(frozen=True)
class EvaluatedBatch:
    """Per-token results of one evaluated microbatch."""

    tokens_BT: Tensor
    labels_BT: Tensor
    cross_entropy_BT: Tensor | None
    """In nats, 0 where unlabelled; None except on the last pipeline stage."""
    is_top_BT: Tensor | None
    """Whether the label is the likeliest token, of equals the lowest id; None as above."""
    null_weight_LBT: Tensor | None
    alpha_LBTJ: Tensor | None = None
    """All router weights, if asked for."""


@torch.no_grad()
def evaluate_batches(
    stage: TideStage, batches: list[TokenBatch], *, keep_alpha: bool = False
) -> list[EvaluatedBatch]:
    """Run microbatches forward, keeping what the model says of every label, and null-bank weights.

    The interleaved schedule takes as many microbatches at a time as there are stages. `keep_alpha` keeps all
    router weights, of this process's layers and tokens.
    """
    stage.eval()
    stage.board.alpha_L = {} if stage.num_blocks else None
    microbatches, reading = _read_memory(stage, batches, stage, None)
    results: list[dict[str, Any]] = run_microbatches(
        partial(_score_step, stage=stage),
        microbatches,
        list(stage.chunks),
        seq_length=batches[0].tokens_BT.size(1),
        forward_only=True,
    )
    null_weights: list[Tensor | None] = [None] * len(batches)
    alphas: list[Tensor | None] = [None] * len(batches)
    if reading is not None:
        if keep_alpha:
            alphas = list(_alphas(stage))
        null_weights = list(stage.null_weights().split(batches[0].tokens_BT.size(0), dim=1))
        reading.close()
    stage.board.alpha_L = None
    results = results or [{"cross_entropy": None, "is_top": None}] * len(batches)
    return [
        EvaluatedBatch(*batch, result["cross_entropy"], result["is_top"], null, alpha)
        for batch, result, null, alpha in zip(batches, results, null_weights, alphas, strict=True)
    ]


def _alphas(stage: TideStage) -> Iterator[Tensor]:
    """The router weights of each microbatch [L, B, T, J]."""
    by_layer = [of_layer for _, of_layer in sorted((stage.board.alpha_L or {}).items())]
    for of_microbatch in zip(*by_layer, strict=True):
        yield torch.stack(of_microbatch).transpose(1, 2)


def accumulate_row_gradients(stage: TideStage, batch: TokenBatch) -> tuple[Tensor, Tensor | None]:
    """Run a microbatch forward and backward; return its distinct ids [U] and d loss / d M [U, K, D] in fp32.

    For a stage without the others and whose parameters want no gradient: activations must, from somewhere.
    """
    stage.train()
    with torch.no_grad():
        microbatches, reading = _read_memory(stage, [batch], stage, None)
    board = stage.board
    if reading is not None and board.rows_UKD is not None:
        board.sink = RowGradient(
            board.rows_UKD.shape, board.rows_UKD.device, board.kernels.mix, stage.chunk_layers
        )
    run_microbatches(
        partial(_forward_step, call=stage, z_loss=0.0, share=1.0),
        microbatches,
        list(stage.chunks),
        seq_length=batch.tokens_BT.size(1),
    )
    ids_U = torch.unique(batch.tokens_BT)
    if reading is None or board.sink is None:
        return ids_U, None
    gradient_UKD = board.sink.total()
    reading.close()
    return ids_U, gradient_UKD


def _read_memory(
    stage: TideStage, batches: list[TokenBatch], call: "Engine | TideStage", ahead: Ahead | None
) -> tuple[list[Microbatch], MemoryReading | None]:
    if stage.num_blocks == 0:
        return [Microbatch(*batch, None) for batch in batches], None
    plan = ahead.plan if ahead else plan_for(stage, batches)
    reading = MemoryReading(stage, call, plan, ahead.fetch if ahead else None)
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
    return output, partial(_loss_and_sums, share=share * microbatch.weight)


def _loss_and_sums(output: LossTensors, share: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Weigh a microbatch's loss by the part of the step that the running schedule averages over."""
    loss, cross_entropy_BT, z_square, count = output
    return share * loss, {"cross_entropy": cross_entropy_BT, "z_square": z_square, "count": count}


def _score_step(
    microbatches: Iterator[Microbatch], chunk: nn.Module, *, stage: TideStage
) -> tuple[Tensor, LossFunction]:
    microbatch = next(microbatches)
    virtual = getattr(chunk, "vp_stage", None) or 0
    output = stage(virtual, microbatch.tokens_BT, Scored(microbatch.labels_BT), microbatch.index_BT)
    return output, _scores


def _scores(output: ScoreTensors) -> tuple[Tensor, dict[str, Tensor]]:
    cross_entropy_BT, is_top_BT = output
    return cross_entropy_BT.sum(), {"cross_entropy": cross_entropy_BT, "is_top": is_top_BT}
