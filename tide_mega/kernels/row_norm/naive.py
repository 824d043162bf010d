"""RMSNorm of the distinct rows in plain torch: the oracle.

Dimensions: U distinct token types, K memory blocks, D width.
"""

import torch
from torch import Tensor


def row_norm(rows_UKD: Tensor, gains_KD: Tensor, eps: float) -> Tensor:
    """Return M_k = RMSNorm(E_k) · gain_k (paper 3.3), computed in fp32, in the rows' dtype."""
    wide = rows_UKD.float()
    unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (unit * gains_KD.float()).to(rows_UKD.dtype)
