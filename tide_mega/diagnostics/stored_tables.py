"""The tables of a checkpoint, row by row: their norms, and the input embedding beside the memory's tables.

Shapes: N rows of a chunk, V vocabulary, D width, K blocks, A = K + 1 tables, the input embedding E first.
"""

import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tide_mega.diagnostics.analysis import SkippedError
from tide_mega.model.canonical import GAINS, TABLES
from tide_mega.trained.run import StoredWeights, TrainedRun

EMBEDDING = "embedding.weight"

Chunks = Iterable[tuple[int, Tensor]]
"""(first row, rows) of a table, from the first row on."""


def table_names(num_blocks: int) -> list[str]:
    """Return E, E_1, ..., E_K."""
    return ["E", *(f"E_{k + 1}" for k in range(num_blocks))]


def side_by_side(weights: StoredWeights) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, rows [N, A, D]) of E and the memory's tables, some 150 MB at a time."""
    for first, tables_NKD in weights.chunks(TABLES):
        N, K, D = tables_NKD.shape
        rows_NAD = torch.empty(N, K + 1, D)
        rows_NAD[:, 1:] = tables_NKD
        del tables_NKD
        rows_NAD[:, 0] = weights.rows(EMBEDDING, first, first + N)
        yield first, rows_NAD


def to_unit(rows_NAD: Tensor, ids_N: Sequence[int]) -> Tensor:
    """Divide rows by their norms, in place; rows of zeros, which have no direction, stay zero.

    Raises:
        SkippedError: a row is not finite; `ids_N` are the token types that rows belong to.
    """
    # By the largest element before: squares of small or large elements leave the range of fp32.
    for order in (float("inf"), 2.0):
        norm_NA = torch.linalg.vector_norm(rows_NAD, order, dim=-1, keepdim=True)
        if not norm_NA.isfinite().all():
            v, a, _ = (~norm_NA.isfinite()).nonzero()[0].tolist()
            name = table_names(a)[-1]
            raise SkippedError(f"row {ids_N[v]} of {name} is not finite: look at an earlier checkpoint")
        rows_NAD /= torch.where(norm_NA > 0, norm_NA, 1.0)
    return rows_NAD


def row_norms(chunks: Chunks) -> NDArray[np.float32]:
    """Return the l2 norm of every row: [V] of [N, D] chunks, [V, K] of [N, K, D] chunks."""
    return np.concatenate([torch.linalg.vector_norm(rows, dim=-1).numpy() for _, rows in chunks])


def gains_note(run: TrainedRun) -> str:
    """Say that E_k is compared, not M_k, and how much the norm's gain could change."""
    gains_KD = run.weights.tensor(GAINS)
    spread = float((gains_KD.std(1, correction=0) / gains_KD.abs().mean(1).clamp_min(1e-30)).max())
    return (
        f"{run.label}: rows of the tables E_k are compared. In M_k = RMSNorm(E_k) each column is also "
        "multiplied by a gain, the same for all rows; over columns the gains vary by at most "
        f"{100 * spread:.1f} % of their mean (standard deviation), so directions differ little where that is "
        "small."
    )


def file_names(labels: Iterable[str]) -> dict[str, str]:
    """Return a different name for each label, of characters that any file system takes."""
    names: dict[str, str] = {}
    for label in labels:
        plain = name = re.sub(r"[^A-Za-z0-9._-]+", "-", label) or "run"
        number = 2
        while name in names.values():
            name, number = f"{plain}-{number}", number + 1
        names[label] = name
    return names
