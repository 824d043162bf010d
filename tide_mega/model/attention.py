"""Core attention for megatron-core's SelfAttention: flash-attn when present, else torch's SDPA.

Shapes: S sequence, B batch, H query heads and G key/value heads of this rank, C head size.
"""

import importlib
from typing import Any

import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn

from tide_mega.parallel.device import detect_libraries


class CausalCoreAttention(nn.Module):
    """softmax(QKᵀ/√C, causal)·V with megatron's [S, B, heads, C] layout and grouped queries."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        **_: Any,
    ) -> None:
        super().__init__()
        if attn_mask_type != AttnMaskType.causal or attention_type != "self":
            raise ValueError(
                f"CausalCoreAttention cannot do {attention_type} attention with {attn_mask_type}"
            )
        self.flash = importlib.import_module("flash_attn") if detect_libraries()["flash-attn"] else None

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
        if self.flash is not None and query_SBHC.is_cuda and query_SBHC.dtype.itemsize == 2:
            inputs = (x.transpose(0, 1) for x in (query_SBHC, key_SBGC, value_SBGC))
            out_BSHC = self.flash.flash_attn_func(*inputs, causal=True)
            return out_BSHC.transpose(0, 1).reshape(S, B, -1)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBHC, key_SBGC, value_SBGC))
        grouped = query.size(1) != key.size(1)
        out_BHSC = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
        return out_BHSC.permute(2, 0, 1, 3).reshape(S, B, -1)
