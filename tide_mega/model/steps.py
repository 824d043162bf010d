"""The gradients of one optimizer step, and one evaluation pass: reads the memory around megatron's schedule.

Dimensions: B sequences, T tokens, L layers, K memory blocks, J = K + 1, U distinct token types, D width.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tide_mega.data.loader import TokenBatch
from tide_mega.memory.memory import Request
from tide_mega.model.chunk import LossTensors, Scored, ScoreTensors, Targets
from tide_mega.model.stage import TideStage
from tide_mega.parallel.accumulation import GradientAccumulator
from tide_mega.parallel.engine import Engine
from tide_mega.parallel.pipeline import LossFunction, run_microbatches


class BareEngine:
    """The engine's interface over plain autograd: exposes a model's local gradients without any optimizer."""

    def __init__(self, module: TideStage) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward pass."""
        return self.module(*args, **kwargs)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Context for all backward passes of one step."""
        yield
        GradientAccumulator(self.module.parameters(), self.module.groups).finish()


@dataclass(frozen=True)
class Microbatch:
    """The input of one forward pass: tokens, labels and, if K > 0, each token's row among those read."""

    tokens_BT: Tensor
    labels_BT: Tensor
    index_BT: Tensor | None
    weight: float = 1.0
    """Weight of its mean loss in the step's, relative to a micro-batch of a full batch."""

    @property
    def micro_batch_size(self) -> int:
        """B."""
        return self.tokens_BT.size(0)


@dataclass
class StepResult:
    """Sums over the tokens that this rank computed in a step; still on the device, without synchronisation."""

    loss_sum: Tensor
    z_square_sum: Tensor
    tokens: Tensor
    cross_entropies: list[Tensor]
    """Cross entropy of each micro-batch [B, T] in nats, 0 where unlabelled; empty except on the last stage."""


def compute_gradients(
    engine: Engine,
    batches: list[TokenBatch],
    z_loss: float,
    *,
    weights: Sequence[float] | None = None,
    window: int | None = None,
    ahead: Request | None = None,
    own_time: AbstractContextManager[object] | None = None,
) -> StepResult:
    """Run forward and backward of all micro-batches of a step; leaves the reduced gradients in the engine.

    The memory is read once before the schedule and its gradient returned once after it, so the schedule, recompute
    and the traffic between pipeline stages are independent of it.

    Args:
        engine: model and optimizer.
        batches: this replica's micro-batches, on every rank of the replica.
        z_loss: weight of the z-loss.
        weights: weight of each micro-batch's mean loss, if the batch is not full (`StepBatches.weights`).
        window: micro-batches served by one reading; None means all.
        ahead: the first reading, already begun.
        own_time: context entered around what this replica computes by itself.
    """
    stage: TideStage = engine.module
    stage.train()
    size = window or len(batches)
    results: list[dict[str, Tensor]] = []
    with engine.accumulate():
        for first in range(0, len(batches), size):
            served = batches[first : first + size]
            step = partial(_forward_step, call=engine, z_loss=z_loss, share=len(served) / len(batches))
            request = ahead if first == 0 else None
            with _memory_read(stage, served, request, wants_gradient=True) as microbatches:
                if weights is not None:
                    of_served = zip(microbatches, weights[first : first + size], strict=True)
                    microbatches = [replace(microbatch, weight=weight) for microbatch, weight in of_served]
                with own_time or nullcontext():
                    results += run_microbatches(
                        step, microbatches, list(stage.chunks), seq_length=served[0].tokens_BT.size(1)
                    )
                if stage.num_blocks:
                    stage.memory.send_gradients()
    return _sums(results, batches[0].tokens_BT.device)


def _sums(results: list[dict[str, Tensor]], device: torch.device) -> StepResult:
    """Sum the results of the micro-batches; only the last pipeline stage has any."""
    if not results:
        zero = torch.zeros((), device=device)
        return StepResult(zero, zero, zero, [])
    return StepResult(
        loss_sum=torch.stack([result["cross_entropy"].sum() for result in results]).sum(),
        z_square_sum=torch.stack([result["z_square"] for result in results]).sum(),
        tokens=torch.stack([result["count"] for result in results]).sum(),
        cross_entropies=[result["cross_entropy"] for result in results],
    )


def read_ahead(stage: TideStage, batches: list[TokenBatch]) -> Request | None:
    """Request the next step's first reading; call after the tables are updated. None without memory."""
    if stage.num_blocks == 0:
        return None
    return stage.memory.request([batch.tokens_BT for batch in batches])


@dataclass(frozen=True)
class EvaluatedBatch:
    """Per-token results of one evaluated micro-batch."""

    tokens_BT: Tensor
    labels_BT: Tensor
    cross_entropy_BT: Tensor | None
    """In nats, 0 where unlabelled; None except on the last pipeline stage."""
    is_top_BT: Tensor | None
    """Whether the label is the most likely token (of equals, the one of lowest id); None as above."""
    null_weight_LBT: Tensor | None
    alpha_LBTJ: Tensor | None = None
    """All router weights, if requested."""


@torch.no_grad()
def evaluate_batches(
    stage: TideStage, batches: list[TokenBatch], *, routers: Literal["nothing", "null", "all"] = "null"
) -> list[EvaluatedBatch]:
    """Run micro-batches forward and return the scores of every label.

    The interleaved schedule needs as many micro-batches at a time as there are stages.

    Args:
        stage: this process's part of the model.
        batches: micro-batches of one shape.
        routers: which router weights to keep: "null", those of the null bank, collected from all stages and tensor
            ranks; "all", also every other one of this process's layers and tokens; "nothing" needs no collective.
    """
    stage.eval()
    records = stage.num_blocks > 0 and routers != "nothing"
    null_weights: list[Tensor | None] = [None] * len(batches)
    alphas: list[Tensor | None] = [None] * len(batches)
    with (
        stage.memory.recording() if records else nullcontext(),
        _memory_read(stage, batches) as microbatches,
    ):
        results: list[dict[str, Any]] = run_microbatches(
            partial(_score_step, stage=stage),
            microbatches,
            list(stage.chunks),
            seq_length=batches[0].tokens_BT.size(1),
            forward_only=True,
        )
        if records:
            null_weights = list(stage.memory.null_weights().split(batches[0].tokens_BT.size(0), dim=1))
        if records and routers == "all":
            alphas = list(stage.memory.router_weights())
    results = results or [{"cross_entropy": None, "is_top": None}] * len(batches)
    return [
        EvaluatedBatch(*batch, result["cross_entropy"], result["is_top"], null, alpha)
        for batch, result, null, alpha in zip(batches, results, null_weights, alphas, strict=True)
    ]


def accumulate_row_gradients(stage: TideStage, batch: TokenBatch) -> tuple[Tensor, Tensor | None]:
    """Run a micro-batch forward and backward; return its distinct ids [U] and d loss / d M [U, K, D] in fp32.

    Works on a single stage whose parameters require no gradient; some activation must require one instead.
    """
    stage.train()
    with _memory_read(stage, [batch], wants_gradient=True) as microbatches:
        run_microbatches(
            partial(_forward_step, call=stage, z_loss=0.0, share=1.0),
            microbatches,
            list(stage.chunks),
            seq_length=batch.tokens_BT.size(1),
        )
        sink = stage.memory.sink
        return torch.unique(batch.tokens_BT), None if sink is None else sink.total()


@contextmanager
def _memory_read(
    stage: TideStage,
    batches: list[TokenBatch],
    request: Request | None = None,
    *,
    wants_gradient: bool = False,
) -> Iterator[list[Microbatch]]:
    """Yield microbatches while the memory that they read is at hand; without memory they have no index."""
    request = request or read_ahead(stage, batches)
    if request is None:
        yield [Microbatch(*batch, None) for batch in batches]
        return
    with stage.memory.read(request, wants_gradient=wants_gradient):
        indexed = zip(batches, request.plan.index_MBT, strict=True)
        yield [Microbatch(*batch, index) for batch, index in indexed]


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
    """Scale a micro-batch's loss by the share of the step that the running schedule averages over."""
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
