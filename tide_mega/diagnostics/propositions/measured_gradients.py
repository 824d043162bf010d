"""Squared gradients of a run's rows, and what they are compared with."""

import math
from dataclasses import dataclass

from tide_mega.data.batch import IGNORE_LABEL, TokenBatch
from tide_mega.diagnostics.analysis import Analysis
from tide_mega.diagnostics.propositions.gradient_sums import GradientSums, OfDecile, by_decile
from tide_mega.trained.run import TrainedRun


@dataclass(frozen=True)
class Measured:
    """One run."""

    label: str
    sums: GradientSums
    deciles: list[OfDecile]


def measure(analysis: Analysis, one: TrainedRun) -> Measured:
    """Take each held-out microbatch of a run as a step, of whole sequences alone: padding is no text."""
    model = analysis.model(one)
    sums = GradientSums.zero(one.config.model.vocab_size, one.num_blocks)
    for batch in analysis.held_out(one):
        is_whole_B = (batch.labels_BT != IGNORE_LABEL).all(1)
        if is_whole_B.any():
            sums.add(model.row_gradients(TokenBatch(*(x_BT[is_whole_B] for x_BT in batch))))
    return Measured(one.label, sums, by_decile(sums, one.bins, one.counts))


def ratio(value: float, to: float | None) -> float | None:
    """Divide; None where there is nothing to divide by."""
    return value / to if to else None


def embeddings_before(one: Measured, base: Measured | None) -> dict[int, float]:
    """Return the baseline's squared embedding gradient by decile; nothing where it saw other text."""
    if base is None or not one.sums.is_of_the_same_text(base.sums):
        return {}
    return {row.decile: row.embedding for row in base.deciles}


def ratios(one: Measured, base: Measured | None) -> tuple[list[float], list[float]]:
    """The tables' squared gradient over the own embedding's and over the baseline's, by decile; NaN without."""
    before = embeddings_before(one, base)
    own = [ratio(row.total, row.embedding) or math.nan for row in one.deciles]
    return own, [ratio(row.total, before.get(row.decile)) or math.nan for row in one.deciles]
