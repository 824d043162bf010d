"""RMSNorm of the distinct rows on CPU, in chunks that stay in the cache.

Dimensions: U distinct token types, K memory blocks, D width; C rows of a chunk.
"""

from typing import Any

import torch
from torch import Tensor

CHUNK_VALUES = 1 << 19
"""Values per chunk: with fewer, calls cost more than the cache saves (tried from 2^15 to 2^22)."""


class _RowNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_UKD: Tensor, gains_KD: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(rows_UKD, gains_KD)
        ctx.eps = eps
        gain_KD, out_UKD = gains_KD.float(), torch.empty_like(rows_UKD)
        for rows, out in zip(_chunks(rows_UKD), _chunks(out_UKD), strict=True):
            wide_CKD = rows.float()
            out.copy_((wide_CKD * _scale(wide_CKD, eps)).mul_(gain_KD))
        return out_UKD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        # d rows = s · (gain · g - s² · rows · mean(rows · gain · g)), where s is the rows' scale.
        rows_UKD, gains_KD = ctx.saved_tensors
        gain_KD, grad_gain_KD = gains_KD.float(), torch.zeros_like(gains_KD, dtype=torch.float32)
        grad_rows_UKD = torch.empty_like(rows_UKD)
        all_chunks = map(_chunks, (rows_UKD, gradients[0], grad_rows_UKD))
        for rows, grad, grad_rows in zip(*all_chunks, strict=True):
            wide_CKD, grad_CKD = rows.float(), grad.float()
            scale_CK1 = _scale(wide_CKD, ctx.eps)
            work_CKD = wide_CKD * grad_CKD
            grad_gain_KD += (work_CKD * scale_CK1).sum(0)
            along_CK1 = work_CKD.mul_(gain_KD).mean(-1, keepdim=True).mul_(-scale_CK1.pow(3))
            torch.mul(grad_CKD, gain_KD, out=work_CKD).mul_(scale_CK1).addcmul_(wide_CKD, along_CK1)
            grad_rows.copy_(work_CKD)
        return grad_rows_UKD, grad_gain_KD.to(gains_KD.dtype), None


def _scale(wide_CKD: Tensor, eps: float) -> Tensor:
    """Return 1 / sqrt(mean of squares + eps) [C, K, 1]."""
    norm_CK1 = torch.linalg.vector_norm(wide_CKD, dim=-1, keepdim=True)
    return norm_CK1.square_().div_(wide_CKD.size(-1)).add_(eps).rsqrt_()


def _chunks(x_UKD: Tensor) -> tuple[Tensor, ...]:
    return x_UKD.split(max(1, CHUNK_VALUES // (x_UKD[0].numel() if len(x_UKD) else 1)))


def row_norm(rows_UKD: Tensor, gains_KD: Tensor, eps: float) -> Tensor:
    """Like `naive.row_norm`."""
    return _RowNorm.apply(rows_UKD, gains_KD, eps)
