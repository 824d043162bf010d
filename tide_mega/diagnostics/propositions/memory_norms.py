"""Norms of memory rows over the whole vocabulary, in chunks.

Shapes: V vocabulary, U rows of a chunk, K blocks, J = K + 1, D width, N logits that are tried.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tide_mega.diagnostics.analysis import SkippedError
from tide_mega.diagnostics.stored_tables import table_names
from tide_mega.kernels.row_norm import row_norm

Chunks = Callable[[], Iterable[Tensor]]
"""Gives the stored rows E [U, K, D] of one part of the vocabulary after another, each time from the first."""

TOLERANCE = 1e-12
"""Relative, of float64 arithmetic on the way."""

_MIXED_ELEMENTS = 2**21


@dataclass(frozen=True)
class NullBound:
    """What is left of the memory when the null logit is s and the other logits are 0 (paper, E.1 to E.3)."""

    num_blocks: int
    largest_row: float
    """C, the largest norm of M_k(v) over tokens and blocks; or what is claimed to be."""
    logits: tuple[float, ...]
    """s."""
    largest_memory: tuple[float, ...]
    """max over tokens of the norm of m(v), for each s."""

    @property
    def bounds(self) -> list[float]:
        """K C / (K + e^s)."""
        return [bound(self.largest_row, self.num_blocks, s) for s in self.logits]

    @property
    def violations(self) -> list[float]:
        """Logits at which a token's memory is larger than the bound, or not a number."""
        triples = zip(self.logits, self.largest_memory, self.bounds, strict=True)
        return [s for s, measured, most in triples if not measured <= most * (1 + TOLERANCE)]


def bound(largest_row: float, num_blocks: int, null_logit: float) -> float:
    """Return K C / (K + e^s)."""
    return num_blocks * largest_row / (num_blocks + math.exp(null_logit))


def threshold(largest_row: float, num_blocks: int, epsilon: float) -> float:
    """Return s* = log(K (C - ε) / ε), at which the bound is ε (paper, E.3).

    Raises:
        ValueError: ε is not between 0 and C.
    """
    if not 0 < epsilon < largest_row:
        raise ValueError(f"ε = {epsilon:g} is not between 0 and C = {largest_row:g}")
    return math.log(num_blocks * (largest_row - epsilon) / epsilon)


def largest_row(chunks: Chunks, gains_KD: Tensor, norm_eps: float) -> float:
    """Return C, the largest norm of M_k(v) over the vocabulary.

    Raises:
        SkippedError: a row or a gain is not finite.
    """
    is_wrong_K = ~gains_KD.isfinite().all(1)
    if is_wrong_K.any():
        table = _table(int(is_wrong_K.nonzero()[0]))
        raise SkippedError(f"the gain of {table} is not finite: look at an earlier checkpoint")
    largest, first = 0.0, 0
    for rows_UKD in chunks():
        norm_UK = _norm(rows_UKD, gains_KD, norm_eps).norm(dim=-1)
        # Of every chunk: Python's max leaves a NaN out.
        if not norm_UK.isfinite().all():
            u, k = (~norm_UK.isfinite()).nonzero()[0].tolist()
            raise SkippedError(f"row {first + u} of {_table(k)} is not finite: look at an earlier checkpoint")
        largest, first = max(largest, float(norm_UK.max())), first + len(rows_UKD)
    return largest


def measure(
    chunks: Chunks, gains_KD: Tensor, norm_eps: float, largest: float, logits: Iterable[float]
) -> NullBound:
    """Mix the rows of every token by the router's softmax of (0, ..., 0, s); `largest` is C."""
    num_blocks = gains_KD.size(0)
    logits = tuple(logits)
    logits_NJ = torch.zeros(len(logits), num_blocks + 1, dtype=torch.float64)
    logits_NJ[:, -1] = torch.tensor(logits, dtype=torch.float64)
    alpha_NK = logits_NJ.softmax(-1)[:, :-1]
    most_N = torch.zeros(len(logits), dtype=torch.float64)
    at_a_time = max(1, _MIXED_ELEMENTS // (len(logits) * gains_KD.size(1)))
    for chunk_UKD in chunks():
        for rows_UKD in chunk_UKD.split(at_a_time):
            mixed_UND = alpha_NK @ _norm(rows_UKD, gains_KD, norm_eps)
            most_N = torch.maximum(most_N, mixed_UND.norm(dim=-1).amax(0))
    return NullBound(num_blocks, largest, logits, tuple(most_N.tolist()))


def _table(k: int) -> str:
    return table_names(k + 1)[-1]


def _norm(rows_UKD: Tensor, gains_KD: Tensor, norm_eps: float) -> Tensor:
    """M as the model computes it, in fp32; what is made of it, in fp64."""
    return row_norm("naive", rows_UKD.float(), gains_KD.float(), norm_eps).double()
