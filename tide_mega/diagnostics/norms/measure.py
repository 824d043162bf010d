"""The norms that a run's checkpoints hold: of the input embedding over training, of the memory's tables at last.

Shapes: V vocabulary, K blocks, F frequency deciles.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tide_mega.diagnostics.analysis import SkippedError
from tide_mega.diagnostics.norms.growth import (
    Growth,
    Order,
    SlotNorms,
    decile_means,
    measure_norms,
    measure_order,
)
from tide_mega.diagnostics.stored_tables import EMBEDDING, row_norms, table_names
from tide_mega.diagnostics.type_groups import DECILE_SLOTS, by_role
from tide_mega.model.canonical import TABLES
from tide_mega.trained.run import StoredWeights, TrainedRun

HISTOGRAM_BINS = 50


@dataclass(frozen=True)
class RunNorms:
    """What a run's checkpoints hold."""

    label: str
    num_blocks: int
    embedding: dict[str, SlotNorms]
    """By slot."""
    order: Order
    tables_FK: NDArray[np.float64] | None
    """Mean norm of each memory table's rows; None without memory."""
    edges: NDArray[np.float64]
    """Of the histogram's bins."""
    density: dict[str, NDArray[np.float64]]
    """Of the norms of rare, mid and common types, one over the unit of norm."""
    growth: Growth
    initial: float
    """Norm that rows are expected to start with."""

    @property
    def means_F(self) -> NDArray[np.float64]:
        """Mean norm of each decile, NaN for one without types."""
        return np.array([self.embedding[slot].mean for slot in DECILE_SLOTS], np.float64)


def densities(
    norms_V: NDArray[np.floating], bins_V: NDArray[np.integer]
) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    """Return histogram edges over the types of all deciles, and the densities of rare, mid and common."""
    roles = by_role(bins_V)
    of_deciles = np.concatenate([norms_V[ids] for ids in roles.values()]).astype(np.float64)
    edges = np.histogram_bin_edges(of_deciles, HISTOGRAM_BINS)
    density = {}
    for role, ids in roles.items():
        counts, _ = np.histogram(norms_V[ids], edges)
        density[role] = counts / max(1, counts.sum()) / np.diff(edges)
    return edges, density


def measure_run(run: TrainedRun) -> RunNorms:
    """Read every checkpoint's embedding and the last one's tables, chunk by chunk.

    Raises:
        SkippedError: the norm of a row is not finite.
    """
    history = [weights for weights in run.history if weights.step < run.step]
    means = [decile_means(_norms(run, weights, EMBEDDING), run.bins) for weights in history]
    norms_V = _norms(run, run.weights, EMBEDDING)
    means.append(decile_means(norms_V, run.bins))
    tokens = [run.tokens_at(weights) for weights in [*history, run.weights]]
    tables_FK = None
    if run.num_blocks:
        tables_FK = decile_means(_norms(run, run.weights, TABLES), run.bins)
    edges, density = densities(norms_V, run.bins)
    model = run.config.model
    return RunNorms(
        label=run.label,
        num_blocks=run.num_blocks,
        embedding=measure_norms(norms_V, run.bins),
        order=measure_order(means[-1]),
        tables_FK=tables_FK,
        edges=edges,
        density=density,
        growth=Growth(tuple(tokens), np.stack(means)),
        initial=model.init_std * model.hidden_size**0.5,
    )


def _norms(run: TrainedRun, weights: StoredWeights, name: str) -> NDArray[np.float32]:
    """Return the norms of a weight's rows, [V] or [V, K], none of which is NaN or infinite."""
    norms = row_norms(weights.chunks(name))
    if not np.isfinite(norms).all():
        v, *k = np.argwhere(~np.isfinite(norms))[0].tolist()
        table = table_names(k[0] + 1)[-1] if k else "E"
        raise SkippedError(
            f"the norm of row {v} of {table} is not finite at step {weights.step} of {run.label}: look at an "
            "earlier checkpoint"
        )
    return norms
