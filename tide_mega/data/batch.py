"""What a loader yields. Shapes: B sequences, T tokens."""

from typing import NamedTuple

from torch import Tensor

IGNORE_LABEL = -1
"""The label of a position with nothing to predict (padding)."""


class TokenBatch(NamedTuple):
    """One microbatch of a data-parallel rank."""

    tokens_BT: Tensor
    """int64 token ids."""
    labels_BT: Tensor
    """int64 id of the next token, or IGNORE_LABEL."""
