"""Core attention for megatron-core's SelfAttention: RoPE, then torch's SDPA, or flash-attn where that is faster.

Shapes: S sequence, B batch, H query heads and G key/value heads of this rank, C head size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn

from tide_mega.kernels.compiled import compiled
from tide_mega.kernels.rope import rotate, rotation
from tide_mega.parallel.device import flash_attention


def takes_groups(query: Tensor) -> bool:
    """Whether torch has a kernel for grouped queries that does not hold scores [S, S]: flash, 16 bits on CUDA."""
    return not query.is_cuda or query.dtype.itemsize == 2


class CausalCoreAttention(nn.Module):
    """softmax(RQ(RK)ᵀ/√C, causal)·V with megatron's [S, B, heads, C] layout and grouped queries.

    R are the rotary positions: turned here, in one pass where compiled, and not by megatron in many.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        *,
        rope_theta: float,
        compile_kernels: bool = False,
        **_: Any,
    ) -> None:
        super().__init__()
        self.rope_theta, self.compile_kernels = rope_theta, compile_kernels
        if attn_mask_type != AttnMaskType.causal or attention_type != "self":
            raise ValueError(
                f"CausalCoreAttention cannot do {attention_type} attention with {attn_mask_type}"
            )

    def forward(
        self,
        query_SBHC: Tensor,
        key_SBGC: Tensor,
        value_SBGC: Tensor,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Return [S, B, H * C]; the mask argument is megatron's and unused, the mask is causal."""
        S, B = query_SBHC.shape[:2]
        cos_S11C, sin_S11C = rotation(S, query_SBHC.size(-1), self.rope_theta, query_SBHC.device)
        turn = compiled(rotate, query_SBHC.device, self.compile_kernels)
        query_SBHC, key_SBGC = turn(query_SBHC, key_SBGC, cos_S11C, sin_S11C)
        flash = flash_attention(query_SBHC.device)
        if flash is not None and query_SBHC.dtype.itemsize == 2:
            inputs = (x.transpose(0, 1) for x in (query_SBHC, key_SBGC, value_SBGC))
            deterministic = torch.are_deterministic_algorithms_enabled()
            out_BSHC = flash(*inputs, causal=True, deterministic=deterministic)
            return out_BSHC.transpose(0, 1).reshape(S, B, -1)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBHC, key_SBGC, value_SBGC))
        grouped = query.size(1) != key.size(1)
        if grouped and not takes_groups(query):
            key, value = (x.repeat_interleave(query.size(1) // x.size(1), dim=1) for x in (key, value))
            grouped = False
        out_BHSC = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
        return out_BHSC.permute(2, 0, 1, 3).reshape(S, B, -1)
