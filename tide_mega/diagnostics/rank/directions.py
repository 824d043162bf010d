"""Matrices cut to a lower rank by singular value decomposition, through their Gram matrices.

The right singular vectors of a matrix X [V, C] are the eigenvectors of X^T X [C, C], which is added up over
chunks of rows, and X cut to rank r is X V_r V_r^T (Eckart and Young): so neither X nor its left factor is ever
held whole.

Shapes: A matrices side by side, N rows of a chunk, V rows, C columns, r rank.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tide_mega.hf.rows_tide import RowError


@dataclass(frozen=True)
class Directions:
    """The right singular vectors of A matrices, those of the largest singular values first."""

    vectors_ACC: Tensor
    """Vector i of a matrix is column i; fp32."""
    squares_AC: Tensor
    """Squared singular values, fp64."""

    @classmethod
    def of(cls, chunks: Iterable[Tensor]) -> "Directions":
        """Find those of matrices given by their rows, chunks [N, A, C].

        Raises:
            RowError: an element is not finite.
            ValueError: there is no chunk.
        """
        gram_ACC: Tensor | None = None
        for rows_NAC in chunks:
            rows_ANC = rows_NAC.transpose(0, 1).double()
            if gram_ACC is None:
                _, A, C = rows_NAC.shape
                gram_ACC = rows_ANC.new_zeros(A, C, C)
            gram_ACC.baddbmm_(rows_ANC.mT, rows_ANC)
        if gram_ACC is None:
            raise ValueError("a matrix without rows has no directions")
        if not gram_ACC.isfinite().all():
            raise RowError("the tables have rows that are not finite: look at an earlier checkpoint")
        squares_AC, vectors_ACC = torch.linalg.eigh(gram_ACC)
        return cls(vectors_ACC.flip(-1).float(), squares_AC.flip(-1).clamp(min=0))

    def cut(self, rows_NAC: Tensor, rank: int) -> Tensor:
        """Return rows of the matrices as they are at rank r."""
        kept_ACr = self.vectors_ACC[..., :rank]
        return (rows_NAC.transpose(0, 1) @ kept_ACr @ kept_ACr.mT).transpose(0, 1)

    def kept(self, rank: int) -> float:
        """Return what share, 0 to 1, of the squared norm of all matrices is left at rank r."""
        return float(self.squares_AC[:, :rank].sum() / self.squares_AC.sum())


def rank_of(percent: int, columns: int) -> int:
    """Return ceil((1 - p) * columns) of p in per cent (paper, appendix J.2)."""
    return -(-(100 - percent) * columns // 100)


def factor_elements(rows: int, columns: int, rank: int) -> int:
    """Return the elements of U [V, r] and V [r, C] together."""
    return (rows + columns) * rank


def largest_that_saves(rows: int, columns: int) -> int:
    """Return the largest rank at which U and V have no more elements than the matrix (equation J.2)."""
    return rows * columns // (rows + columns)
