"""RMSNorm of the distinct rows on a GPU: each row of a block is kept in registers, read once and written once.

The gradient of the gains is summed by chunks of rows, and the chunks in order, so it is the same from run to run.

Dimensions: U distinct token types, K memory blocks, D width, C chunks of rows. D_PAD is the next power of two.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from tide_mega.kernels.tuning import Tile, tile_of

BACKWARD_PROGRAMS = 1024
"""Chunks times blocks: several per multiprocessor. Not their count, on which the sums would then depend."""


@triton.jit
def forward_kernel(
    rows_ptr: "Any",
    gains_ptr: "Any",
    out_ptr: "Any",
    eps: "Any",
    D: tl.constexpr,
    K: tl.constexpr,
    D_PAD: tl.constexpr,
) -> None:
    """Normalise the row of one token type and block."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D_PAD)
    inside_d = d < D
    row_d = tl.load(rows_ptr + row * D + d, mask=inside_d, other=0.0).to(tl.float32)
    gain_d = tl.load(gains_ptr + row % K * D + d, mask=inside_d, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(row_d * row_d, 0) / D + eps)
    tl.store(out_ptr + row * D + d, (row_d * scale * gain_d).to(out_ptr.dtype.element_ty), mask=inside_d)


@triton.jit
def backward_kernel(
    rows_ptr: "Any",
    gains_ptr: "Any",
    gradient_ptr: "Any",
    grad_rows_ptr: "Any",
    grad_gains_ptr: "Any",
    eps: "Any",
    U: "Any",
    CHUNK: "Any",
    D: tl.constexpr,
    K: tl.constexpr,
    D_PAD: tl.constexpr,
) -> None:
    """Compute the gradients of one block's rows in a chunk of CHUNK types, and their part of the gain's."""
    chunk, k = tl.program_id(0) // K, tl.program_id(0) % K
    d = tl.arange(0, D_PAD)
    inside_d = d < D
    gain_d = tl.load(gains_ptr + k * D + d, mask=inside_d, other=0.0).to(tl.float32)
    grad_gain_d = tl.zeros([D_PAD], tl.float32)
    here_d = (chunk.to(tl.int64) * CHUNK * K + k) * D + d
    for _ in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, U)):
        row_d = tl.load(rows_ptr + here_d, mask=inside_d, other=0.0).to(tl.float32)
        gradient_d = tl.load(gradient_ptr + here_d, mask=inside_d, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(row_d * row_d, 0) / D + eps)
        unit_d = row_d * scale
        grad_gain_d += gradient_d * unit_d
        grad_unit_d = gradient_d * gain_d
        along = tl.sum(grad_unit_d * unit_d, 0) / D
        grad_row_d = (grad_unit_d - unit_d * along) * scale
        tl.store(grad_rows_ptr + here_d, grad_row_d.to(grad_rows_ptr.dtype.element_ty), mask=inside_d)
        here_d += K * D
    tl.store(grad_gains_ptr + tl.program_id(0).to(tl.int64) * D + d, grad_gain_d, mask=inside_d)


def norm_forward(rows_UKD: Tensor, gains_KD: Tensor, eps: float, tile: Tile | None = None) -> Tensor:
    """Run the forward kernel on contiguous tensors; `tile` overrides the tuning table."""
    U, K, D = rows_UKD.shape
    tile = tile or tile_of("norm_forward", rows_UKD.device, K, D)
    out_UKD = torch.empty_like(rows_UKD)
    if U:
        forward_kernel[(U * K,)](
            *(rows_UKD, gains_KD, out_UKD, eps),
            D=D,
            K=K,
            D_PAD=triton.next_power_of_2(D),
            num_warps=tile.warps,
            enable_fp_fusion=True,
        )
    return out_UKD


def norm_backward(
    rows_UKD: Tensor, gains_KD: Tensor, gradient_UKD: Tensor, eps: float, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """Run the backward kernel on contiguous tensors; return the gradients of rows and gains."""
    U, K, D = rows_UKD.shape
    tile = tile or tile_of("norm_backward", rows_UKD.device, K, D)
    size = triton.cdiv(U, max(1, BACKWARD_PROGRAMS // K)) or 1
    chunks = triton.cdiv(U, size)
    grad_rows_UKD = torch.empty_like(rows_UKD)
    parts_CKD = torch.empty((chunks, K, D), device=rows_UKD.device, dtype=torch.float32)
    if U:
        backward_kernel[(chunks * K,)](
            *(rows_UKD, gains_KD, gradient_UKD, grad_rows_UKD, parts_CKD, eps, U, size),
            D=D,
            K=K,
            D_PAD=triton.next_power_of_2(D),
            num_warps=tile.warps,
            enable_fp_fusion=True,
        )
    return grad_rows_UKD, parts_CKD.sum(0).to(gains_KD.dtype)


class _RowNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_UKD: Tensor, gains_KD: Tensor, eps: float) -> Tensor:
        rows_UKD, gains_KD = rows_UKD.contiguous(), gains_KD.contiguous()
        ctx.save_for_backward(rows_UKD, gains_KD)
        ctx.eps = eps
        return norm_forward(rows_UKD, gains_KD, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        rows_UKD, gains_KD = ctx.saved_tensors
        grad_rows_UKD, grad_gains_KD = norm_backward(rows_UKD, gains_KD, gradients[0].contiguous(), ctx.eps)
        return grad_rows_UKD, grad_gains_KD, None


def row_norm(rows_UKD: Tensor, gains_KD: Tensor, eps: float) -> Tensor:
    """Like `naive.row_norm`."""
    return _RowNorm.apply(rows_UKD, gains_KD, eps)
