"""RMSNorm as megatron-core's specs build it, usable under sequence parallelism without apex."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """torch's fused RMSNorm over the last dimension, with the gain tagged for sequence parallelism.

    megatron-core's own torch norm refuses sequence parallelism; its apex and Transformer Engine norms need
    those libraries.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor, fused: Callable[[Tensor, Tensor, float], Any] | None = None) -> Any:
        """Normalise x [..., D].

        Args:
            x: any leading dimensions.
            fused: does more in the norm's own pass: `fused(x, gain, eps)` is returned instead. Called here and
                not outside, since ZeRO-3 brings a module's parameters together for its forward alone.
        """
        if fused is not None:
            return fused(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
