"""RMSNorm of the distinct rows on CPU, in chunks that stay in the cache.

Shapes: U distinct token types, K memory blocks, D width; C rows of a chunk.
"""

from typing import Any

import torch
from torch import Tensor

from tide_mega.kernels.row_norm import naive

CHUNK_VALUES = 1 << 18


class _RowNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_UKD: Tensor, gains_KD: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(rows_UKD, gains_KD)
        ctx.eps = eps
        out_UKD = torch.empty_like(rows_UKD)
        for chunk, out in zip(_chunks(rows_UKD), _chunks(out_UKD), strict=True):
            out.copy_(naive.row_norm(chunk, gains_KD, eps))
        return out_UKD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        rows_UKD, gains_KD = ctx.saved_tensors
        gain_KD, grad_gain_KD = gains_KD.float(), torch.zeros_like(gains_KD, dtype=torch.float32)
        grad_rows_UKD = torch.empty_like(rows_UKD)
        all_chunks = map(_chunks, (rows_UKD, gradients[0], grad_rows_UKD))
        for rows, grad, grad_rows in zip(*all_chunks, strict=True):
            wide_CKD, grad_CKD = rows.float(), grad.float()
            scale_CK1 = torch.rsqrt(wide_CKD.square().mean(-1, keepdim=True) + ctx.eps)
            unit_CKD = wide_CKD * scale_CK1
            grad_gain_KD += (grad_CKD * unit_CKD).sum(0)
            grad_unit_CKD = grad_CKD * gain_KD
            along_CK1 = (grad_unit_CKD * unit_CKD).mean(-1, keepdim=True)
            grad_rows.copy_((grad_unit_CKD - unit_CKD * along_CK1) * scale_CK1)
        return grad_rows_UKD, grad_gain_KD.to(gains_KD.dtype), None


def _chunks(x_UKD: Tensor) -> tuple[Tensor, ...]:
    return x_UKD.split(max(1, CHUNK_VALUES // (x_UKD[0].numel() if len(x_UKD) else 1)))


def row_norm(rows_UKD: Tensor, gains_KD: Tensor, eps: float) -> Tensor:
    """As `naive.row_norm`."""
    return _RowNorm.apply(rows_UKD, gains_KD, eps)
