"""Modules for megatron-core's specs: core attention, RMSNorm, and the input embedding.

Dimensions: S sequence, B batch, H query heads and G key/value heads of this rank, C head size; in the embedding
T tokens, S tokens of the sequence on this rank, D hidden size.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    VocabParallelEmbedding,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn

from tide_mega.kernels.compiled import compiled
from tide_mega.kernels.rope import rotate, rotation
from tide_mega.kernels.row_lookup import look_up
from tide_mega.parallel.device import flash_attention


def takes_groups(query: Tensor) -> bool:
    """Return whether torch can do grouped queries without materialising scores [S, S]: flash, 16 bits on CUDA."""
    return not query.is_cuda or query.dtype.itemsize == 2


class CausalCoreAttention(nn.Module):
    """softmax(RQ(RK)ᵀ/√C, causal)·V with grouped queries, in megatron's layout [S, B, heads, C].

    Computed by torch's SDPA, or by flash-attn where that is faster. R is the rotary embedding, applied here, in
    one pass when compiled, instead of by megatron, which takes many.
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
        """Return [S, B, H * C]; the mask is always causal, and megatron's mask argument is unused."""
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


class RMSNorm(nn.Module):
    """torch's fused RMSNorm over the last dimension, with the gain tagged for sequence parallelism.

    megatron-core's own torch norm refuses sequence parallelism, and its other norms need apex or Transformer
    Engine.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor, fused: Callable[[Tensor, Tensor, float], Any] | None = None) -> Any:
        """Normalise x [..., D].

        Args:
            x: of any leading dimensions.
            fused: computes more in the norm's own pass: `fused(x, gain, eps)` is returned instead. It is called
                inside the module because ZeRO-3 gathers a module's parameters only for its forward pass.
        """
        if fused is not None:
            return fused(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class InputEmbedding(nn.Module):
    """Replaces VocabParallelEmbedding in megatron-core's LanguageModelEmbedding: its weight, our lookup.

    Megatron's lookup accumulates the gradient of a row in the weight's precision on a CPU, where a frequent
    token of a bf16 run loses most of its gradient, and in arbitrary order on a GPU.
    """

    def __init__(self, megatron: VocabParallelEmbedding) -> None:
        """Take over the weight, a parameter with all attributes that megatron set, and the shard's range."""
        super().__init__()
        self.weight: nn.Parameter = megatron.weight
        self._first, self._group = megatron.vocab_start_index, megatron.tp_group
        self._scatters: bool = megatron.reduce_scatter_embeddings

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Return the tokens' rows [B, T, D]; with sequence parallelism those of this rank's slice [S, B, D]."""
        if self._group.size() == 1:
            return look_up(self.weight, tokens_BT)
        # Tokens of other shards read some row of this one, spread like their ids; values and gradients are masked.
        entries = self.weight.size(0)
        is_absent_BT = (tokens_BT < self._first) | (tokens_BT >= self._first + entries)
        rows_BTD = look_up(self.weight, (tokens_BT - self._first) % entries)
        rows_BTD = rows_BTD.masked_fill(is_absent_BT[..., None], 0.0)
        if self._scatters:
            return reduce_scatter_to_sequence_parallel_region(
                rows_BTD.transpose(0, 1).contiguous(), group=self._group
            )
        return reduce_from_tensor_model_parallel_region(rows_BTD, group=self._group)
