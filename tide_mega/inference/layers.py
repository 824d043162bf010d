"""The layers of Llama and TIDE over a static cache: one program for prompts and steps, on CPU and CUDA.

Tested against `model/reference.py`, which has the equations of the paper (arXiv 2605.06216).

Shapes: B sequences, T tokens of each in one pass, N = B T, S places of the cache, H heads of queries, G of keys
and values, R = H / G, C head size, D hidden size, K memory blocks, J = K + 1.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tide_mega.inference.matrices import Matrix
from tide_mega.inference.model_config import ModelShape


@dataclass(frozen=True)
class Layer:
    """A layer's weights, those with the same input fused into one matrix, and its part of the cache."""

    attention_gain_D: Tensor
    query_key_value: Matrix
    output: Matrix
    ffn_gain_D: Tensor
    gate_up: Matrix
    down: Matrix
    router_JD: Tensor | None
    """In fp32."""
    keys_BGSC: Tensor
    values_BGSC: Tensor


@dataclass(frozen=True)
class Places:
    """Positions of one pass's tokens in their texts, and so in the cache."""

    sequence_B1: Tensor
    position_BT: Tensor
    cos_BT1C: Tensor
    sin_BT1C: Tensor
    """Sines of the angles, negated for the first half of a head."""
    visible_B1TS: Tensor | None
    """Places a token attends to; None if each attends to all."""
    extent: int
    """S of this pass: later places are empty for every sequence."""


Rows = Callable[[], Tensor]
"""Returns M [N, K, D], fp32, when the first layer needs it."""


def run_layers(
    layers: list[Layer], shape: ModelShape, h_ND: Tensor, places: Places, memory: Tensor | Rows | None
) -> Tensor:
    """Return the hidden states [N, D] after the last layer; adds keys and values to the cache."""
    for layer in layers:
        normed_ND = rms_norm(h_ND, layer.attention_gain_D, shape.norm_eps)
        h_ND = h_ND + layer.output(_attend(layer, shape, layer.query_key_value(normed_ND), places))
        normed_ND = rms_norm(h_ND, layer.ffn_gain_D, shape.norm_eps)
        gate_NF, up_NF = layer.gate_up(normed_ND).chunk(2, -1)
        h_ND = h_ND + layer.down(F.silu(gate_NF).mul_(up_NF))
        if layer.router_JD is None or memory is None:
            continue
        # In fp32 whatever the layers' dtype: products this small are faster on a CPU, and α keeps its precision.
        alpha_NJ = F.linear(normed_ND.float(), layer.router_JD).softmax(-1)
        if callable(memory):
            memory = memory()
        m_ND = torch.bmm(alpha_NJ[:, None, :-1], memory)[:, 0]
        h_ND = h_ND + m_ND.to(h_ND.dtype)
    return h_ND


def rms_norm(x: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    """Normalise in fp32; return the input's dtype."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * gain_D


def _attend(layer: Layer, shape: ModelShape, projected_NX: Tensor, places: Places) -> Tensor:
    """Add keys and values to the cache and return the attention output [N, H C].

    The R query heads of a group are folded into the token dimension, so no key or value is repeated.
    """
    B, T = places.position_BT.shape
    H, G, C = shape.num_heads, shape.num_groups, shape.head_size
    heads_BTXC = projected_NX.view(B, T, -1, C)
    turned_BTXC = _rotate(heads_BTXC[:, :, : H + G], places)
    layer.keys_BGSC[places.sequence_B1, :, places.position_BT] = turned_BTXC[:, :, H:]
    layer.values_BGSC[places.sequence_B1, :, places.position_BT] = heads_BTXC[:, :, H + G :]
    R = H // G
    queries = turned_BTXC[:, :, :H].reshape(B, T, G, R, C).permute(0, 2, 3, 1, 4).reshape(B, G, R * T, C)
    mask = places.visible_B1TS
    if mask is not None and R * T > 1:
        mask = mask[:, :, None].expand(-1, -1, R, -1, -1).reshape(B, 1, R * T, -1)
    attended = F.scaled_dot_product_attention(
        queries,
        layer.keys_BGSC[:B, :, : places.extent],
        layer.values_BGSC[:B, :, : places.extent],
        attn_mask=mask,
    )
    return attended.view(B, G, R, T, C).permute(0, 3, 1, 2, 4).reshape(B * T, H * C)


def _rotate(x_BTXC: Tensor, places: Places) -> Tensor:
    """RoPE: rotate the pair (i, i + C/2) of every head by its token's angle."""
    swapped = x_BTXC.roll(x_BTXC.shape[-1] // 2, -1)
    return torch.addcmul(x_BTXC * places.cos_BT1C, swapped, places.sin_BT1C)


def angles(shape: ModelShape, positions: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin [positions, C], fp32; the sines of a head's first half negated, for `_rotate`."""
    C = shape.head_size
    frequencies = shape.rope_theta ** (-torch.arange(0, C, 2, dtype=torch.float32) / C)
    turned = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
    return turned.cos().repeat(1, 2), torch.cat((-turned.sin(), turned.sin()), 1)
