"""Cosine distances between the rows that tables hold for the same token type.

Shapes: N rows of a chunk, V vocabulary, D width, A tables.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tide_mega.diagnostics.stored_tables import to_unit


@dataclass(frozen=True)
class Distances:
    """Mean cosine distances of groups of token types."""

    types: dict[str, int]
    """In each group."""
    mean_AA: dict[str, NDArray[np.float64]]
    """Mean over a group's types of 1 - cos, 0 to 2; NaN for a group without types."""
    zeros_A: tuple[int, ...]
    """Rows of zeros among all types: their cosine with any row is taken as 0."""


def measure_distances(
    chunks: Iterable[tuple[int, Tensor]], groups: Mapping[str, NDArray[np.integer]]
) -> Distances:
    """Compare every pair of tables in one pass.

    Args:
        chunks: (first row, rows [N, A, D]) of the tables side by side, ascending; overwritten.
        groups: ids of each group's types; groups may overlap.

    Raises:
        SkippedError: a row is not finite.
    """
    sums: dict[str, Tensor] = {}
    zeros_A: Tensor | None = None
    for first, rows_NAD in chunks:
        unit_NAD = to_unit(rows_NAD, range(first, first + len(rows_NAD)))
        cosine_NAA = unit_NAD @ unit_NAD.transpose(1, 2)
        of_chunk_A = (cosine_NAA.diagonal(dim1=1, dim2=2) == 0).sum(0)
        zeros_A = of_chunk_A if zeros_A is None else zeros_A + of_chunk_A
        for name, ids in groups.items():
            here = ids[(ids >= first) & (ids < first + len(unit_NAD))] - first
            sum_AA = cosine_NAA[torch.from_numpy(here)].sum(0, dtype=torch.float64)
            sums[name] = sums[name] + sum_AA if name in sums else sum_AA
    if zeros_A is None:
        raise ValueError("there are no rows to compare")
    return Distances(
        types={name: len(ids) for name, ids in groups.items()},
        mean_AA={name: _distance(sums[name], len(ids)) for name, ids in groups.items()},
        zeros_A=tuple(zeros_A.tolist()),
    )


def _distance(cosine_sum_AA: Tensor, types: int) -> NDArray[np.float64]:
    if not types:
        return np.full(cosine_sum_AA.shape, np.nan)
    distance_AA = 1 - cosine_sum_AA.numpy() / types
    np.fill_diagonal(distance_AA, 0.0)  # of a table to itself, rows of zeros included
    return distance_AA
