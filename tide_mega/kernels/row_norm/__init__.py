"""RMSNorm of the distinct rows of a step, forward and backward.

Dimensions: U distinct token types, K memory blocks, D width.
"""

from torch import Tensor

from tide_mega.kernels.row_norm import cpu, naive

__all__ = ["row_norm"]


def row_norm(version: str, rows_UKD: Tensor, gains_KD: Tensor, eps: float) -> Tensor:
    """Return M_k = RMSNorm(E_k) · gain_k (paper 3.3) in the rows' dtype, by version naive, cpu or triton."""
    if version == "triton":
        from tide_mega.kernels.row_norm import triton

        return triton.row_norm(rows_UKD, gains_KD, eps)
    return {"naive": naive, "cpu": cpu}[version].row_norm(rows_UKD, gains_KD, eps)
