"""Rotary position embedding (RoPE): the pair (i, i + C/2) of a head at position t turns by t · theta^(-2i/C).

Dimensions: S sequence, B batch, H query heads, G key heads, C head size.
"""

import functools

import torch
from torch import Tensor


def rotate(query_SBHC: Tensor, key_SBGC: Tensor, cos_S11C: Tensor, sin_S11C: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by the angles of `rotation`, in fp32, rounded once to the inputs' dtype."""
    return _turn(query_SBHC, cos_S11C, sin_S11C), _turn(key_SBGC, cos_S11C, sin_S11C)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


@functools.lru_cache(maxsize=8)
def rotation(length: int, head_size: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of all angles [S, 1, 1, C] in fp32, to be shared by all layers."""
    with torch.inference_mode(False):
        frequencies = theta ** (
            -torch.arange(0, head_size, 2, dtype=torch.float32, device=device) / head_size
        )
        positions = torch.arange(length, dtype=torch.float32, device=device)
        angles_S11C = torch.outer(positions, frequencies).repeat(1, 2)[:, None, None]
        return angles_S11C.cos(), angles_S11C.sin()
