"""Squared gradients that a token's rows receive, summed over steps.

Shapes: V vocabulary, K blocks, D width, U distinct token types of a step.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tide_mega.data.frequency import NUM_BINS
from tide_mega.trained.model import RowGradients

TOLERANCE = 1e-12
"""Relative, of float64 sums in another order."""
PIECE = 256
"""Token types whose gradients are squared at a time."""


@dataclass(eq=False)
class GradientSums:
    """Sums over steps by token type; float64, on the CPU."""

    tables_VK: Tensor
    """Squared norm of the gradient of each table's row."""
    embedding_V: Tensor
    """That of the input embedding's row, by its path into the first layer alone."""
    weakest_V: Tensor
    """The smallest squared norm of any table at any step with the token (G²min of the proposition)."""
    steps_V: Tensor
    """Steps with the token."""
    tokens_V: Tensor
    """Tokens of the type."""
    zeros_V: Tensor
    """Rows, of steps with the token, whose gradient was exactly 0."""
    step_tokens: list[int] = field(default_factory=list)
    """Tokens of each step."""

    @classmethod
    def zero(cls, vocab_size: int, num_blocks: int) -> "GradientSums":
        """Before the first step; K = 0 has the embedding alone."""
        empty = torch.zeros(vocab_size, dtype=torch.float64)
        return cls(
            tables_VK=torch.zeros(vocab_size, num_blocks, dtype=torch.float64),
            embedding_V=empty.clone(),
            weakest_V=torch.full_like(empty, torch.inf),
            steps_V=empty.clone(),
            tokens_V=empty.clone(),
            zeros_V=empty.clone(),
        )

    def add(self, step: RowGradients) -> None:
        """Take one step's gradients."""
        ids_U = step.ids_U.cpu()
        self.step_tokens.append(int(step.counts_U.sum()))
        self.steps_V[ids_U] += 1
        self.tokens_V[ids_U] += step.counts_U.cpu().double()
        self.embedding_V[ids_U] += _squares(step.embedding_UD)
        if step.tables_UKD is None:
            return
        squares_UK = _squares(step.tables_UKD)
        self.tables_VK[ids_U] += squares_UK
        self.weakest_V[ids_U] = torch.minimum(self.weakest_V[ids_U], squares_UK.min(1).values)
        self.zeros_V[ids_U] += (squares_UK == 0).sum(1).double()

    def is_of_the_same_text(self, other: "GradientSums") -> bool:
        """Whether both have steps of the same sizes, and in all as many tokens of each type."""
        return self.step_tokens == other.step_tokens and torch.equal(
            *(
                torch.stack((of.nonzero()[:, 0].double(), of[of > 0]))
                for of in (self.tokens_V, other.tokens_V)
            )
        )

    @property
    def steps(self) -> int:
        """Steps taken."""
        return len(self.step_tokens)

    @property
    def num_blocks(self) -> int:
        """K."""
        return self.tables_VK.size(1)

    @property
    def total_V(self) -> Tensor:
        """Over all tables."""
        return self.tables_VK.sum(1)

    @property
    def smallest_V(self) -> Tensor:
        """K times that of the table with the least."""
        return self.num_blocks * self.tables_VK.min(1).values

    @property
    def pathways_V(self) -> Tensor:
        """The total over that of the table with the most: 1 (one table has all) to K (all alike); NaN if 0."""
        return self.total_V / self.tables_VK.max(1).values

    @property
    def bound_V(self) -> Tensor:
        """K x steps with the token x G²min (paper, F.5, with the counted instead of the expected steps)."""
        return torch.where(self.steps_V > 0, self.num_blocks * self.steps_V * self.weakest_V, 0.0)

    def below_bound(self) -> int:
        """Count token types whose total is less than K times the least table's, or than `bound_V`, or NaN."""
        most_V = torch.maximum(self.smallest_V, self.bound_V)
        return int((~(self.total_V >= most_V * (1 - TOLERANCE))).sum())


@dataclass(frozen=True)
class OfDecile:
    """Token types of one decile that appeared; means over types but where said otherwise."""

    decile: int
    types: int
    total: float
    """Squared gradient over the tables, over all steps."""
    smallest: float
    """K times the least table's."""
    embedding: float
    """Squared gradient of the input embedding's row."""
    pathways: float
    """Median of `pathways_V`; NaN without memory."""
    steps_seen: float
    """Steps with the token, over all types of the decile, those that did not appear too."""
    steps_expected: float
    """Sum over steps of κ, over the same types: κ = 1 - (1 - f)^BT of a step of BT tokens (paper, F.1)."""


def by_decile(sums: GradientSums, bins_V: np.ndarray, counts_V: np.ndarray) -> list[OfDecile]:
    """Average over deciles with a type that appeared; `counts_V` are of the training text."""
    frequency_V = counts_V / max(1, counts_V.sum())
    expected_V = np.zeros(len(frequency_V))
    for tokens, steps in Counter(sums.step_tokens).items():
        # log1p: 1 - f rounds to 1 for the rarest types of a large corpus.
        expected_V -= steps * np.expm1(tokens * np.log1p(-frequency_V))
    seen_V = sums.steps_V.numpy() > 0
    found = []
    for decile in range(NUM_BINS):
        of_decile = bins_V == decile
        chosen = torch.from_numpy(of_decile & seen_V)
        if not chosen.any():
            continue
        pathways = sums.pathways_V[chosen] if sums.num_blocks else torch.tensor([torch.nan])
        found.append(
            OfDecile(
                decile=decile,
                types=int(chosen.sum()),
                total=float(sums.total_V[chosen].mean()),
                smallest=float(sums.smallest_V[chosen].mean()) if sums.num_blocks else 0.0,
                embedding=float(sums.embedding_V[chosen].mean()),
                pathways=float(pathways.nanmedian()),
                steps_seen=float(sums.steps_V[torch.from_numpy(of_decile)].mean()),
                steps_expected=float(expected_V[of_decile].mean()),
            )
        )
    return found


def _squares(gradient: Tensor) -> Tensor:
    # In pieces: in fp64, a step's gradients by all tables are larger than what they were computed with.
    return torch.cat([rows.double().square().sum(-1) for rows in gradient.split(PIECE)]).cpu()
