"""What is logged: one record for a window of training steps, one for an evaluation.

Every loss is a mean cross entropy in nats per token; a null weight is a mean router weight from 0 to 1.
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
    """Mean over all tokens of the steps applied since the last log line; NaN where there were none."""
    z_loss: float
    """The same mean of the weighted z-loss, which `loss` leaves out."""
    grad_norm: float
    """Global L2 norm over all parameters before clipping, at this step; infinite where it was skipped."""
    grad_norm_tables: float | None
    """The memory tables' part of it; None without memory, infinite where it is not finite."""
    lr: float
    """Learning rate of this step's update."""
    tokens_per_second: float
    """Over all devices, without evaluation and checkpoints."""
    mfu: float | None
    """Model FLOPs utilisation, 0 to 1; None where the device's peak is not known."""
    step_seconds: float
    eta_seconds: float
    """Training time left, in seconds."""
    null_weight_by_layer: list[float | None]
    """[L], over the tokens of this step; empty without memory."""
    traffic: dict[str, dict[str, int]] = field(default_factory=dict)
    """Bytes rank 0 sent and received since the last log line, by kind (`tide_mega.memory.meter`)."""
    goodput: float | None = None
    """Productive over wall time since the run's first start, 0 to 1 (`tide_mega.training.goodput`)."""
    skipped_steps: int = 0
    """Steps of the run so far that were not applied."""
    spikes: int = 0
    """Loss spikes of the run so far."""
    rollbacks: int = 0
    skipped_windows: int = 0
    """Windows of the training data that could not be read, and whose place others took, in the run so far."""
    skipped_shards: int = 0
    """Shards that these are of, or that were skipped at a start."""
    slowest_ratio: float | None = None
    """Own computing time of the slowest replica over the median's since the last log line; None with one."""
    slow_ranks: list[int] = field(default_factory=list)
    """Ranks of the replicas at or above `faults.straggler_ratio`."""
    memory_bytes: int | None = None
    """In use by the process that uses most: allocated on its GPU, or resident on CPU; None without diagnostics."""
    peak_memory_bytes: int | None = None
    """The most that any process has used so far."""
    exchanged_bytes_per_step: float | None = None
    """What `traffic` sums to, over the steps it was counted in."""


@dataclass(frozen=True)
class EventRecord:
    """A step that was not as it should be."""

    step: int
    """Optimizer steps done once it was dealt with: after a rollback, the checkpoint's."""
    tokens: int
    """Training tokens consumed so far, those of skipped steps included."""
    event: str
    """skipped, spike (applied all the same) or rollback."""
    reason: str
    """loss or gradient (not finite), or spike."""
    at_step: int
    """The step itself, from 1."""
    loss: float
    """Its mean loss over the ranks where it is finite."""
    z_score: float | None
    """Robust standard deviations above the median of the last applied steps; None where it is not judged."""


def perplexity_of(loss: float) -> float:
    """exp of a mean cross entropy in nats; infinite where that is beyond a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class TextResult:
    """A text scored by a model, every token but its first."""

    loss: float
    """Over all of these tokens."""
    perplexity: float
    bits_per_byte: float | None
    """Whatever the tokenizer; None for a text whose tokens stand for no byte."""
    tokens: int
    """Scored."""
    rare: float | None
    """Over targets of bins 0-2."""
    mid: float | None
    """Over targets of bins 3-6."""
    common: float | None
    """Over targets of bins 7-9."""
    loss_by_bin: BySlot
    """By the target's slot, decile of the training text."""
    count_by_bin: dict[str, int]
    """Scored tokens in each slot."""

    @classmethod
    def of(cls, deciles: DecileResult, num_bytes: int) -> "TextResult":
        """Take what was accumulated over a text, at least a token, and the bytes of these tokens."""
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
    """By the target's slot (`tide_mega.metrics.slots.SLOTS`)."""
    count_by_bin: dict[str, int]
    """Held-out target tokens in each slot."""
    null_weight_by_layer: list[float | None]
    """[L]; empty without memory."""
    null_weight_by_bin: dict[str, BySlot]
    """By the input token's slot: "mean" over the layers, and "last" layer; empty without memory."""
    texts: dict[str, TextResult] = field(default_factory=dict)
    """Perplexity on `data.perplexity_texts`, by their names."""
    null_weight_by_layer_and_bin: list[BySlot] = field(default_factory=list)
    """[L], by the input token's slot; empty without memory."""

    @classmethod
    def of(
        cls,
        step: int,
        tokens: int,
        deciles: DecileResult,
        null_weight: NullWeightResult,
        texts: dict[str, TextResult] | None = None,
    ) -> "EvalRecord":
        """Join what the two accumulators gave of held-out text, and the other texts' results."""
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
