"""Records: what is logged of a window of training steps, a faulty step, an evaluation, and the live diagnostics.

Every loss is a mean cross entropy in nats per token; a null weight is a mean router weight of the null bank from
0 to 1. Blocks are the K memory tables, layers the L routers; slots are `tide_mega.metrics.deciles.SLOTS`. A
`LiveRecord` goes with each log line, a `WeightsRecord` with each evaluation.
"""

import math
from dataclasses import dataclass, field

from tide_mega.metrics.deciles import BySlot, DecileResult, NullWeightResult


@dataclass(frozen=True)
class TrainRecord:
    """The optimizer steps since the last log line."""

    step: int
    """Optimizer steps done."""
    tokens: int
    """Training tokens consumed so far, over all ranks."""
    loss: float
    """Mean over all tokens of the steps applied since the last log line; NaN if there were none."""
    z_loss: float
    """The same mean of the weighted z-loss, which is not part of `loss`."""
    grad_norm: float
    """Global L2 norm over all parameters before clipping, at this step; infinite if it was skipped."""
    grad_norm_tables: float | None
    """The memory tables' part of it; None without memory, infinite if it is not finite."""
    lr: float
    """Learning rate of this step's update."""
    tokens_per_second: float
    """Over all devices, excluding time in evaluation and checkpoints."""
    mfu: float | None
    """Model FLOPs utilisation, 0 to 1; None if the device's peak is not known."""
    step_seconds: float
    eta_seconds: float
    """Training time left, in seconds."""
    null_weight_by_layer: list[float | None]
    """[L], mean over the tokens of this step; empty without memory."""
    traffic: dict[str, dict[str, int]] = field(default_factory=dict)
    """Bytes that rank 0 sent and received since the last log line, by kind (`tide_mega.memory.traffic`)."""
    goodput: float | None = None
    """Productive over wall time since the run's first start, 0 to 1 (`tide_mega.training.goodput`)."""
    skipped_steps: int = 0
    """Steps of the run so far that were not applied."""
    spikes: int = 0
    """Loss spikes of the run so far."""
    rollbacks: int = 0
    skipped_windows: int = 0
    """Unreadable windows of the training data that were replaced by others, in the run so far."""
    skipped_shards: int = 0
    """Shards that these windows belong to, or that were skipped at a start."""
    slowest_ratio: float | None = None
    """Computing time of the slowest replica over the median's since the last log line; None with one replica."""
    slow_ranks: list[int] = field(default_factory=list)
    """Ranks of the replicas at or above `faults.straggler_ratio`."""
    memory_bytes: int | None = None
    """Memory in use, maximum over processes: allocated on GPU or resident on CPU; None without diagnostics."""
    peak_memory_bytes: int | None = None
    """Maximum over processes of the peak so far."""
    exchanged_bytes_per_step: float | None = None
    """Total of `traffic`, divided by the steps over which it was counted."""


@dataclass(frozen=True)
class EventRecord:
    """A faulty step."""

    step: int
    """Optimizer steps done after it was handled; after a rollback, those of the checkpoint."""
    tokens: int
    """Training tokens consumed so far, including those of skipped steps."""
    event: str
    """skipped, spike (applied anyway) or rollback."""
    reason: str
    """loss or gradient (not finite), or spike."""
    at_step: int
    """Number of the faulty step, from 1."""
    loss: float
    """Mean loss of the step over the ranks where it is finite."""
    z_score: float | None
    """Robust standard deviations above the median of the last applied steps; None if not judged."""


def perplexity_of(loss: float) -> float:
    """Return exp of a mean cross entropy in nats; infinite if that overflows a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class TextResult:
    """Scores of a text, over every token but its first."""

    loss: float
    """Over all of these tokens."""
    perplexity: float
    bits_per_byte: float | None
    """Comparable between tokenizers; None for a text whose tokens stand for no byte."""
    tokens: int
    """Scored."""
    rare: float | None
    """Over targets of bins 0-2."""
    mid: float | None
    """Over targets of bins 3-6."""
    common: float | None
    """Over targets of bins 7-9."""
    loss_by_bin: BySlot
    """By the target's slot, with deciles of the training text."""
    count_by_bin: dict[str, int]
    """Scored tokens in each slot."""

    @classmethod
    def of(cls, deciles: DecileResult, num_bytes: int) -> "TextResult":
        """Build the result from sums over a text of at least one scored token, and the bytes of these tokens."""
        loss = math.nan if deciles.loss is None else deciles.loss
        return cls(
            loss=loss,
            perplexity=perplexity_of(loss),
            bits_per_byte=loss * deciles.tokens / math.log(2) / num_bytes if num_bytes else None,
            tokens=deciles.tokens,
            rare=deciles.rare,
            mid=deciles.mid,
            common=deciles.common,
            loss_by_bin=deciles.loss_by_bin,
            count_by_bin=deciles.count_by_bin,
        )


@dataclass(frozen=True)
class EvalRecord:
    """An evaluation on held-out text."""

    step: int
    """Optimizer steps done."""
    tokens: int
    """Training tokens consumed so far; the held-out tokens are in `count_by_bin`."""
    loss: float | None
    """Over all held-out target tokens."""
    rare: float | None
    """Over targets of bins 0-2."""
    mid: float | None
    """Over targets of bins 3-6."""
    common: float | None
    """Over targets of bins 7-9."""
    loss_by_bin: BySlot
    """By the target's slot (`tide_mega.metrics.deciles.SLOTS`)."""
    count_by_bin: dict[str, int]
    """Held-out target tokens in each slot."""
    null_weight_by_layer: list[float | None]
    """[L]; empty without memory."""
    null_weight_by_bin: dict[str, BySlot]
    """By the input token's slot: "mean" over the layers, and of the "last" layer; empty without memory."""
    texts: dict[str, TextResult] = field(default_factory=dict)
    """Results on `data.perplexity_texts`, by name."""
    null_weight_by_layer_and_bin: list[BySlot] = field(default_factory=list)
    """[L], each by the input token's slot; empty without memory."""

    @classmethod
    def of(
        cls,
        step: int,
        tokens: int,
        deciles: DecileResult,
        null_weight: NullWeightResult,
        texts: dict[str, TextResult] | None = None,
    ) -> "EvalRecord":
        """Combine the results of both accumulators on held-out text, and the results on other texts."""
        by_bin = {"mean": null_weight.mean_by_bin, "last": null_weight.last_by_bin}
        return cls(
            step=step,
            tokens=tokens,
            **deciles.means(),
            null_weight_by_layer=null_weight.by_layer,
            null_weight_by_bin=by_bin if null_weight.by_layer else {},
            texts=texts or {},
            null_weight_by_layer_and_bin=null_weight.by_layer_and_bin,
        )


@dataclass(frozen=True)
class LiveRecord:
    """Kind "live": training tokens by decile, beside the `TrainRecord` of the same step."""

    step: int
    """Optimizer steps done."""
    tokens: int
    """Training tokens consumed so far."""
    first_step: int
    """First step whose losses are in the means, from 1: the one after the last log line, unless a run resumed from
    a checkpoint that did not keep their sums."""
    loss: float | None
    """Mean cross entropy in nats over the training tokens of the applied steps; None if there were none."""
    rare: float | None
    """Over targets of bins 0-2."""
    mid: float | None
    """Over targets of bins 3-6."""
    common: float | None
    """Over targets of bins 7-9."""
    loss_by_bin: BySlot
    """By the target's slot."""
    count_by_bin: dict[str, int]
    """Training tokens in each slot; counts times means sum to `loss` times all tokens."""
    null_weight_by_layer_and_bin: list[BySlot]
    """[L], mean router weight of the null bank over this step's tokens by their own slot; empty without memory."""
    grad_norm_by_table: list[float]
    """[K], L2 norm before clipping at this step; their squares sum to that of `grad_norm_tables`. Infinite
    if it is not finite; empty without memory."""

    @classmethod
    def of(
        cls,
        step: int,
        tokens: int,
        *,
        first_step: int,
        deciles: DecileResult,
        null_weight: NullWeightResult,
        grad_norm_by_table: list[float],
    ) -> "LiveRecord":
        """Combine the accumulated results."""
        return cls(
            step=step,
            tokens=tokens,
            first_step=first_step,
            **deciles.means(),
            null_weight_by_layer_and_bin=null_weight.by_layer_and_bin,
            grad_norm_by_table=grad_norm_by_table,
        )


@dataclass(frozen=True)
class WeightsRecord:
    """Kind "weights": norms and distances of embedding and tables, beside the `EvalRecord` of the same step."""

    step: int
    """Optimizer steps done."""
    tokens: int
    """Training tokens consumed so far."""
    types_by_bin: dict[str, int]
    """Number of types of the vocabulary in each slot."""
    embedding_norm_by_bin: BySlot
    """Mean L2 norm of the input embedding's rows."""
    table_norm_by_bin: BySlot
    """Mean L2 norm of the tables' rows, over all blocks; empty without memory, like what follows."""
    table_norm_by_block_and_bin: list[BySlot]
    """[K]"""
    sampled_types: int
    """Types that the distances are means over: the same in every record, as many of each decile where it has
    them."""
    cosine_distance_to_embedding: list[float]
    """[K], 1 - cos(E[v], E_k[v]), 0 to 2."""
    cosine_distance_between: list[list[float]]
    """[K][K], 1 - cos(E_j[v], E_k[v])."""


Record = TrainRecord | EvalRecord | LiveRecord | WeightsRecord | EventRecord

KINDS: dict[str, type[Record]] = {
    "train": TrainRecord,
    "eval": EvalRecord,
    "live": LiveRecord,
    "weights": WeightsRecord,
    "event": EventRecord,
}
"""What metrics.jsonl calls each kind of record."""
