"""Router softmax, mix by index and residual sum on a GPU: one kernel forward, one backward.

Both process tokens in the order of their rows: a block of tokens shares few rows, so a row is loaded from memory
once and then served by the L1 cache. Sums are in fp32 and rounded once.

Dimensions: N tokens, D hidden size, K memory blocks, J = K + 1, U distinct token types of the step. In the
kernels BN and BD are the tokens and the width of a tile, K_PAD and J_PAD the next powers of two.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from tide_mega.kernels.row_gradient.sink import RowGradient
from tide_mega.kernels.token_order import TokenOrder
from tide_mega.kernels.tuning import Tile, tile_of


@triton.jit
def forward_kernel(
    logits_ptr: "Any",
    residual_ptr: "Any",
    ffn_ptr: "Any",
    rows_ptr: "Any",
    index_ptr: "Any",
    sorted_ptr: "Any",
    alpha_ptr: "Any",
    out_ptr: "Any",
    N: "Any",
    D: tl.constexpr,
    K: tl.constexpr,
    J_PAD: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
) -> None:
    """Compute one tile [BN, BD] of the output, and α of its tokens."""
    columns: tl.constexpr = (D + BD - 1) // BD
    column = tl.program_id(0) % columns
    place_n = tl.program_id(0) // columns * BN + tl.arange(0, BN)
    inside_n = place_n < N
    # Positions beyond the end read the last token again and store nothing.
    token_n = tl.load(sorted_ptr + tl.minimum(place_n, N - 1)).to(tl.int64)
    row_n = tl.load(index_ptr + token_n).to(tl.int64)
    d = column * BD + tl.arange(0, BD)
    inside_d = (d < D)[None, :]
    here_nd = token_n[:, None] * D + d[None, :]
    sum_nd = tl.load(residual_ptr + here_nd, mask=inside_d, other=0.0).to(tl.float32)
    sum_nd += tl.load(ffn_ptr + here_nd, mask=inside_d, other=0.0).to(tl.float32)

    j = tl.arange(0, J_PAD)
    logit_nj = tl.load(
        logits_ptr + token_n[:, None] * (K + 1) + j[None, :], mask=(j <= K)[None, :], other=float("-inf")
    ).to(tl.float32)
    weight_nj = tl.exp(logit_nj - tl.max(logit_nj, 1)[:, None])
    tl.store(
        alpha_ptr + token_n[:, None] * (K + 1) + j[None, :],
        weight_nj / tl.sum(weight_nj, 1)[:, None],
        mask=inside_n[:, None] & (j <= K)[None, :],
    )
    # α goes through memory, every column tile writing the same: extracting it from the tile costs two barriers.
    tl.debug_barrier()

    row_nd = row_n[:, None] * (K * D) + d[None, :]
    for k in tl.static_range(K):
        alpha_n = tl.load(alpha_ptr + token_n * (K + 1) + k)
        memory_nd = tl.load(rows_ptr + row_nd + k * D, mask=inside_d, other=0.0).to(tl.float32)
        sum_nd += alpha_n[:, None] * memory_nd
    tl.store(out_ptr + here_nd, sum_nd.to(out_ptr.dtype.element_ty), mask=inside_n[:, None] & inside_d)


@triton.jit
def backward_kernel(
    alpha_ptr: "Any",
    gradient_ptr: "Any",
    rows_ptr: "Any",
    index_ptr: "Any",
    sorted_ptr: "Any",
    grad_logits_ptr: "Any",
    N: "Any",
    D: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
) -> None:
    """Compute the logits' gradient of BN tokens: dα_k = <dh, M_k>, then back through the softmax."""
    place_n = tl.program_id(0) * BN + tl.arange(0, BN)
    inside_n = place_n < N
    token_n = tl.load(sorted_ptr + place_n, mask=inside_n, other=0).to(tl.int64)
    row_n = tl.load(index_ptr + token_n).to(tl.int64)
    k = tl.arange(0, K_PAD)
    row_nk = row_n[:, None] * (K * D) + k[None, :] * D

    # Summed elementwise over the tiles of the width, so that threads reduce only once, at the end.
    product_nkd = tl.zeros([BN, K_PAD, BD], tl.float32)
    for first in range(0, D, BD):
        d = first + tl.arange(0, BD)
        inside_d = d < D
        gradient_nd = tl.load(
            gradient_ptr + token_n[:, None] * D + d[None, :], mask=inside_d[None, :], other=0.0
        )
        memory_nkd = tl.load(
            rows_ptr + row_nk[:, :, None] + d[None, None, :],
            mask=(k < K)[None, :, None] & inside_d[None, None, :],
            other=0.0,
        )
        product_nkd += gradient_nd[:, None, :].to(tl.float32) * memory_nkd.to(tl.float32)
    grad_alpha_nk = tl.sum(product_nkd, 2)

    here_nk = token_n[:, None] * (K + 1) + k[None, :]
    inside_nk = inside_n[:, None] & (k < K)[None, :]
    alpha_nk = tl.load(alpha_ptr + here_nk, mask=inside_nk, other=0.0)
    along_n = tl.sum(alpha_nk * grad_alpha_nk, 1)
    grad_nk = alpha_nk * (grad_alpha_nk - along_n[:, None])
    tl.store(grad_logits_ptr + here_nk, grad_nk.to(grad_logits_ptr.dtype.element_ty), mask=inside_nk)
    # The null bank's M is zero, and so is its dα.
    null_n = tl.load(alpha_ptr + token_n * (K + 1) + K, mask=inside_n, other=0.0)
    grad_null_n = (-null_n * along_n).to(grad_logits_ptr.dtype.element_ty)
    tl.store(grad_logits_ptr + token_n * (K + 1) + K, grad_null_n, mask=inside_n)


def mix_forward(
    logits_NJ: Tensor,
    residual: Tensor,
    ffn: Tensor,
    rows_UKD: Tensor,
    order: TokenOrder,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the forward kernel on contiguous tensors; `tile` overrides the tuning table.

    Returns:
        The output in the residual's shape and dtype, and α [N, J] in fp32.
    """
    N, K, D = order.num_tokens, rows_UKD.size(1), rows_UKD.size(2)
    tile = tile or tile_of("mix_forward", residual.device, K, D)
    out = torch.empty_like(residual)
    alpha_NJ = torch.empty(logits_NJ.shape, device=logits_NJ.device, dtype=torch.float32)
    if N:
        columns = triton.cdiv(D, tile.width)
        forward_kernel[(triton.cdiv(N, tile.items) * columns,)](
            *(logits_NJ, residual, ffn, rows_UKD, order.index_N, order.sorted_N, alpha_NJ, out),
            N,
            D=D,
            K=K,
            J_PAD=triton.next_power_of_2(K + 1),
            BN=tile.items,
            BD=tile.width,
            num_warps=tile.warps,
            enable_fp_fusion=True,
            num_stages=tile.stages,
        )
    return out, alpha_NJ


def mix_backward(
    alpha_NJ: Tensor,
    gradient_ND: Tensor,
    rows_UKD: Tensor,
    order: TokenOrder,
    dtype: torch.dtype,
    tile: Tile | None = None,
) -> Tensor:
    """Run the backward kernel on contiguous tensors; return the logits' gradient [N, J] in `dtype`."""
    N, D = gradient_ND.shape
    K = rows_UKD.size(1)
    tile = tile or tile_of("mix_backward", gradient_ND.device, K, D)
    grad_logits_NJ = torch.empty(alpha_NJ.shape, device=alpha_NJ.device, dtype=dtype)
    if N:
        backward_kernel[(triton.cdiv(N, tile.items),)](
            *(alpha_NJ, gradient_ND, rows_UKD, order.index_N, order.sorted_N, grad_logits_NJ),
            N,
            D=D,
            K=K,
            K_PAD=triton.next_power_of_2(K),
            BN=tile.items,
            BD=tile.width,
            num_warps=tile.warps,
            enable_fp_fusion=True,
            num_stages=tile.stages,
        )
    return grad_logits_NJ


class _FusedMix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_NJ: Tensor,
        residual: Tensor,
        ffn: Tensor,
        rows_UKD: Tensor,
        order: TokenOrder,
        sink: RowGradient | None,
    ) -> tuple[Tensor, Tensor]:
        rows_UKD = rows_UKD.contiguous()
        out, alpha_NJ = mix_forward(
            logits_NJ.contiguous(), residual.contiguous(), ffn.contiguous(), rows_UKD, order
        )
        ctx.save_for_backward(alpha_NJ, rows_UKD)
        ctx.order, ctx.sink, ctx.logits_dtype = order, sink, logits_NJ.dtype
        ctx.mark_non_differentiable(alpha_NJ)
        return out, alpha_NJ

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0]
        alpha_NJ, rows_UKD = ctx.saved_tensors
        gradient_ND = gradient.contiguous().view(-1, gradient.size(-1))
        grad_logits_NJ = None
        if ctx.needs_input_grad[0]:
            grad_logits_NJ = mix_backward(alpha_NJ, gradient_ND, rows_UKD, ctx.order, ctx.logits_dtype)
        if ctx.sink is not None:
            ctx.sink.add(ctx.order, alpha_NJ, gradient_ND)
        return grad_logits_NJ, gradient, gradient, None, None, None


def fused_mix(
    logits_NJ: Tensor,
    residual: Tensor,
    ffn: Tensor,
    rows_UKD: Tensor,
    order: TokenOrder,
    sink: RowGradient | None,
) -> tuple[Tensor, Tensor]:
    """Like `tide_mega.kernels.mix.mix`; residual and FFN output may differ from the rows in dtype, not in shape.

    Raises:
        ValueError: the shapes do not match.
    """
    N, K, D = order.num_tokens, rows_UKD.size(1), rows_UKD.size(2)
    if logits_NJ.shape != (N, K + 1):
        raise ValueError(
            f"logits are {list(logits_NJ.shape)}: {N} tokens and {K} blocks need [{N}, {K + 1}]."
        )
    if residual.shape != ffn.shape or residual.size(-1) != D or residual.numel() != N * D:
        raise ValueError(
            f"residual {list(residual.shape)} and ffn {list(ffn.shape)} must be alike: [..., {D}] with {N} tokens."
        )
    return _FusedMix.apply(logits_NJ, residual, ffn, rows_UKD, order, sink)
