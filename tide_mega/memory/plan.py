"""Which table rows a step needs.

Shapes: M microbatches of the step, B sequences, T tokens, U distinct token types among them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MemoryPlan:
    """The distinct token types of a step and where each token finds its row among them."""

    ids_U: Tensor
    """Distinct ids, ascending, int64."""
    index_MBT: list[Tensor]
    """For each microbatch the row in `ids_U` of every token, int64."""


def plan_rows(tokens_MBT: list[Tensor]) -> MemoryPlan:
    """Plan the rows of all microbatches of a step together, so that each type is fetched once."""
    flat = torch.cat([tokens.flatten() for tokens in tokens_MBT])
    ids_U, index = torch.unique(flat, sorted=True, return_inverse=True)
    pieces = index.split([tokens.numel() for tokens in tokens_MBT])
    return MemoryPlan(
        ids_U, [piece.view_as(tokens) for piece, tokens in zip(pieces, tokens_MBT, strict=True)]
    )
