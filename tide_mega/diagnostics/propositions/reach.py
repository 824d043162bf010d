"""How far apart two rows of a MemoryBlock can be after its norm, and rows that are so far apart.

M(x) = g x / sqrt(mean(x²) + eps) lies in the ellipsoid sum (M_i / g_i)² < D: its axes are 2 sqrt(D) |g_i|
long, and rows come as close to its surface as they are large against eps. So with gains that stay as they are, two
rows can have any distance from 0 up to the longest axis, which no two reach, and none beyond.

Shapes: N distances asked for, K blocks, D width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tide_mega.kernels.row_norm import row_norm

TARGETS = (1e-4, 1e-2, 0.1, 0.5, 0.9, 0.999)
"""Distances asked for, as parts of the most that is possible."""
ALLOWED = 1e-5
"""Relative deviation of a distance made from the one asked for."""
_ROOT_MEAN_SQUARE = 1024.0
"""Of the rows that are made: eps of the norm does not show in fp32 beside its square."""
_HALVINGS = 60


@dataclass(frozen=True, eq=False)
class Reached:
    """Distances asked for and made, for each target and block of a model [N, K]."""

    limit_K: Tensor
    asked_NK: Tensor
    made_NK: Tensor

    @property
    def deviation(self) -> float:
        """The largest relative deviation."""
        return float((self.made_NK / self.asked_NK - 1).abs().max())

    @property
    def holds(self) -> bool:
        """Whether every distance was made."""
        return self.deviation <= ALLOWED


def limit(gains_KD: Tensor) -> Tensor:
    """Return the least distance [K] that no two rows of a block have: 2 sqrt(D) max |g|; fp64."""
    return 2 * math.sqrt(gains_KD.size(1)) * gains_KD.double().abs().amax(1)


def rows_apart(distances_NK: Tensor, gains_KD: Tensor, norm_eps: float) -> tuple[Tensor, Tensor]:
    """Find rows u and v [N, K, D] whose normalised rows have these distances in block k.

    Both lie on the great circle of the axes with the largest gain and one other, mirrored at the latter: that
    part of them is the same, and the distance grows with the angle between them, which is bisected through the
    norm itself.

    Raises:
        ValueError: a distance is negative, or not below the block's `limit`, or D is 1.
    """
    if gains_KD.size(1) < 2:
        raise ValueError("rows of width 1 lie on no circle")
    most_K = limit(gains_KD)
    if bool((distances_NK < 0).any()) or bool((distances_NK >= most_K).any()):
        each = ", ".join(f"{most:.4g}" for most in most_K.tolist())
        raise ValueError(f"distances must be from 0 to below 2 sqrt(D) max |gain|, here {each} of the blocks")
    low_NK = torch.zeros_like(distances_NK, dtype=torch.float64)
    high_NK = torch.full_like(low_NK, math.pi / 2)
    for _ in range(_HALVINGS):
        middle_NK = (low_NK + high_NK) / 2
        found_NK = separation(*_on_circle(middle_NK, gains_KD), gains_KD, norm_eps)
        is_less_NK = found_NK < distances_NK
        low_NK = torch.where(is_less_NK, middle_NK, low_NK)
        high_NK = torch.where(is_less_NK, high_NK, middle_NK)
    return _on_circle(high_NK, gains_KD)


def separation(u_NKD: Tensor, v_NKD: Tensor, gains_KD: Tensor, norm_eps: float) -> Tensor:
    """Return the distance [N, K] of rows after the model's norm; fp64."""
    m_u, m_v = (row_norm("naive", rows, gains_KD.float(), norm_eps).double() for rows in (u_NKD, v_NKD))
    return (m_u - m_v).norm(dim=-1)


def reach_targets(gains_KD: Tensor, norm_eps: float) -> Reached:
    """Make rows at each of `TARGETS`, and measure what the model's norm makes of them."""
    most_K = limit(gains_KD)
    asked_NK = torch.tensor(TARGETS, dtype=torch.float64)[:, None] * most_K
    made_NK = separation(*rows_apart(asked_NK, gains_KD, norm_eps), gains_KD, norm_eps)
    return Reached(most_K, asked_NK, made_NK)


def _on_circle(angle_NK: Tensor, gains_KD: Tensor) -> tuple[Tensor, Tensor]:
    N, (K, D) = angle_NK.size(0), gains_KD.shape
    order_KD = gains_KD.abs().argsort(1, descending=True)
    longest_NK1 = order_KD[:, 0].expand(N, K)[..., None]
    other_NK1 = order_KD[:, 1].expand(N, K)[..., None]
    radius = _ROOT_MEAN_SQUARE * math.sqrt(D)
    sine_NK1 = (radius * angle_NK.sin()).float()[..., None]
    shared_NKD = torch.zeros(N, K, D).scatter(2, other_NK1, (radius * angle_NK.cos()).float()[..., None])
    return shared_NKD.scatter(2, longest_NK1, sine_NK1), shared_NKD.scatter(2, longest_NK1, -sine_NK1)
