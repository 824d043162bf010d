"""What a run says of TIDE while it trains: one record beside each log line, one beside each evaluation.

Blocks are the K memory tables, layers the L routers; slots are `tide_mega.metrics.slots.SLOTS`.
"""

from dataclasses import dataclass

from tide_mega.metrics.deciles import BySlot, DecileResult, NullWeightResult


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
    """Mean cross entropy in nats over the training tokens of the applied steps; None where there were none."""
    rare: float | None
    """Over targets of bins 0-2."""
    mid: float | None
    """Over targets of bins 3-6."""
    common: float | None
    """Over targets of bins 7-9."""
    loss_by_bin: BySlot
    """By the target's slot."""
    count_by_bin: dict[str, int]
    """Training tokens in each slot: counts times means add up to `loss` times all of them."""
    null_weight_by_layer_and_bin: list[BySlot]
    """[L], mean router weight of the null bank over this step's tokens by their own slot; empty without memory."""
    grad_norm_by_table: list[float]
    """[K], L2 norm before clipping at this step; their squares add up to that of `grad_norm_tables`. Infinite
    where it is not finite; empty without memory."""

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
        """Join what was accumulated."""
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
    """Kind "weights": what the embedding and the tables look like, beside the `EvalRecord` of the same step."""

    step: int
    """Optimizer steps done."""
    tokens: int
    """Training tokens consumed so far."""
    types_by_bin: dict[str, int]
    """Types of the vocabulary in each slot."""
    embedding_norm_by_bin: BySlot
    """Mean L2 norm of the input embedding's rows."""
    table_norm_by_bin: BySlot
    """Mean L2 norm of the tables' rows, over all blocks; empty without memory, as what follows."""
    table_norm_by_block_and_bin: list[BySlot]
    """[K]"""
    sampled_types: int
    """Types that the distances are means over: the same in every record, as many of each decile where it has
    them."""
    cosine_distance_to_embedding: list[float]
    """[K], 1 - cos(E[v], E_k[v]), 0 to 2."""
    cosine_distance_between: list[list[float]]
    """[K][K], 1 - cos(E_j[v], E_k[v])."""
