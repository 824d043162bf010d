"""RMSNorm and router logits on a GPU: the router shares the norm's passes over the hidden state.

Forward reads the hidden state once from memory (and again from the caches, once its scale is known), and writes
the normalised one. Backward adds the router's part to the feed-forward network's gradient on the way into the
norm's backward: neither that sum nor the router's part is written. The gradients of gain and router are summed
by chunks of tokens, and the chunks in order, so they are the same from run to run. The router's gradient takes a
kernel of its own, which reads the normalised state once more: its sums [J, D] do not fit into a program's
registers beside whole rows, and keeping them in memory would move more bytes than that.

Dimensions: N tokens, D hidden size, J = K + 1 banks, C chunks of tokens. In the kernels BN and BD are the tokens
and the width of a tile, J_PAD and D_PAD the next powers of two, J_PAD at least 16.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from tide_mega.kernels.norm_router.router_gradient import chunks_of, router_gradient
from tide_mega.kernels.tuning import Tile, tile_of

BACKWARD_PROGRAMS = 256
"""Number of chunks: all run at once on 132 multiprocessors, and few enough to keep their partial sums small.
Using the GPU's own count would make the sums depend on it."""


@triton.jit
def forward_kernel(
    hidden_ptr: "Any",
    gain_ptr: "Any",
    router_ptr: "Any",
    normed_ptr: "Any",
    logits_ptr: "Any",
    scale_ptr: "Any",
    eps: "Any",
    N: "Any",
    D: tl.constexpr,
    J: tl.constexpr,
    J_PAD: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """Normalise BN tokens and route them."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    inside_n = n < N
    # Tokens beyond the end repeat the last one and are not stored.
    row_nd = tl.minimum(n, N - 1).to(tl.int64)[:, None] * D
    square_nd = tl.zeros([BN, BD], tl.float32)
    for first in range(0, D, BD):
        d = first + tl.arange(0, BD)
        hidden_nd = tl.load(hidden_ptr + row_nd + d[None, :], mask=(d < D)[None, :], other=0.0).to(tl.float32)
        square_nd += hidden_nd * hidden_nd
    scale_n = 1.0 / tl.sqrt(tl.sum(square_nd, 1) / D + eps)
    tl.store(scale_ptr + n, scale_n, mask=inside_n)

    j = tl.arange(0, J_PAD)
    sum_nj = tl.zeros([BN, J_PAD], tl.float32)
    for first in range(0, D, BD):
        d = first + tl.arange(0, BD)
        inside_d = d < D
        hidden_nd = tl.load(
            hidden_ptr + row_nd + d[None, :],
            mask=inside_d[None, :],
            other=0.0,
            eviction_policy="evict_first",
        ).to(tl.float32)
        gain_d = tl.load(gain_ptr + d, mask=inside_d, other=0.0).to(tl.float32)
        normed_nd = (hidden_nd * scale_n[:, None] * gain_d[None, :]).to(normed_ptr.dtype.element_ty)
        tl.store(normed_ptr + row_nd + d[None, :], normed_nd, mask=inside_n[:, None] & inside_d[None, :])
        router_jd = tl.load(
            router_ptr + j[:, None] * D + d[None, :],
            mask=(j < J)[:, None] & inside_d[None, :],
            other=0.0,
            eviction_policy="evict_last",
        )
        if INTERPRETED:  # its dot reads the bits of a bfloat16 as an integer
            normed_nd = normed_nd.to(tl.float32)
            router_jd = router_jd.to(tl.float32)
        # fp32 as three products of tf32 parts, which lose no more than fp32 sums do.
        sum_nj = tl.dot(normed_nd, tl.trans(router_jd), sum_nj, input_precision="tf32x3")
    tl.store(
        logits_ptr + n.to(tl.int64)[:, None] * J + j[None, :],
        sum_nj.to(logits_ptr.dtype.element_ty),
        mask=inside_n[:, None] & (j < J)[None, :],
    )


@triton.jit
def backward_kernel(
    hidden_ptr: "Any",
    gain_ptr: "Any",
    router_ptr: "Any",
    gradient_ptr: "Any",
    grad_logits_ptr: "Any",
    scale_ptr: "Any",
    grad_hidden_ptr: "Any",
    gain_parts_ptr: "Any",
    N: "Any",
    CHUNK: "Any",
    J: "Any",
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BN: tl.constexpr,
) -> None:
    """Compute the hidden state's gradient of CHUNK tokens, BN rows at a time, and their part of the gain's."""
    d = tl.arange(0, D_PAD)
    inside_d = d < D
    gain_d = tl.load(gain_ptr + d, mask=inside_d, other=0.0).to(tl.float32)
    grad_gain_d = tl.zeros([D_PAD], tl.float32)
    begin = tl.program_id(0) * CHUNK
    end = tl.minimum(begin + CHUNK, N)
    for first in range(begin, end, BN):
        n = first + tl.arange(0, BN)
        inside_n = n < end
        here_nd = n.to(tl.int64)[:, None] * D + d[None, :]
        inside_nd = inside_n[:, None] & inside_d[None, :]
        hidden_nd = tl.load(hidden_ptr + here_nd, mask=inside_nd, other=0.0, eviction_policy="evict_first")
        grad_nd = tl.load(gradient_ptr + here_nd, mask=inside_nd, other=0.0, eviction_policy="evict_first")
        grad_nd = grad_nd.to(tl.float32)
        scale_n = tl.load(scale_ptr + n, mask=inside_n, other=0.0)
        for j in range(J):  # a runtime bound: unrolled, it would spill
            # The same for all tokens, so it stays in the L1 cache.
            router_d = tl.load(router_ptr + j * D + d, mask=inside_d, other=0.0, eviction_policy="evict_last")
            grad_logit_n = tl.load(grad_logits_ptr + n.to(tl.int64) * J + j, mask=inside_n, other=0.0)
            grad_nd += grad_logit_n.to(tl.float32)[:, None] * router_d.to(tl.float32)[None, :]
        unit_nd = hidden_nd.to(tl.float32) * scale_n[:, None]
        grad_gain_d += tl.sum(grad_nd * unit_nd, 0)
        grad_unit_nd = grad_nd * gain_d[None, :]
        along_n = tl.sum(grad_unit_nd * unit_nd, 1) / D
        grad_hidden_nd = (grad_unit_nd - unit_nd * along_n[:, None]) * scale_n[:, None]
        tl.store(
            grad_hidden_ptr + here_nd, grad_hidden_nd.to(grad_hidden_ptr.dtype.element_ty), mask=inside_nd
        )
    tl.store(gain_parts_ptr + tl.program_id(0).to(tl.int64) * D + d, grad_gain_d, mask=inside_d)


def norm_router_forward(
    hidden_ND: Tensor, gain_D: Tensor, router_JD: Tensor, eps: float, tile: Tile | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward kernel on contiguous tensors; `tile` overrides the tuning table.

    Returns:
        ñ [N, D], logits [N, J], and 1 over each token's root mean square [N] in fp32.
    """
    (N, D), J = hidden_ND.shape, router_JD.size(0)
    tile = tile or tile_of("norm_router_forward", hidden_ND.device, J - 1, D)
    normed_ND = torch.empty_like(hidden_ND)
    logits_NJ = hidden_ND.new_empty(N, J)
    scale_N = torch.empty(N, device=hidden_ND.device, dtype=torch.float32)
    if N:
        forward_kernel[(triton.cdiv(N, tile.items),)](
            *(hidden_ND, gain_D, router_JD, normed_ND, logits_NJ, scale_N, eps, N),
            D=D,
            J=J,
            J_PAD=max(16, triton.next_power_of_2(J)),
            BN=tile.items,
            BD=tile.width,
            INTERPRETED=hidden_ND.device.type == "cpu",
            num_warps=tile.warps,
            enable_fp_fusion=True,
            num_stages=tile.stages,
        )
    return normed_ND, logits_NJ, scale_N


def norm_router_backward(
    hidden_ND: Tensor,
    gain_D: Tensor,
    router_JD: Tensor,
    scale_N: Tensor,
    gradient_ND: Tensor,
    grad_logits_NJ: Tensor,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the backward kernel on contiguous tensors; return the gradients of hidden state and gain.

    Args:
        hidden_ND: input of the norm.
        gain_D: of the norm.
        router_JD: the router.
        scale_N: as returned by the forward pass.
        gradient_ND: of ñ, from the feed-forward network.
        grad_logits_NJ: of the logits.
        tile: overrides the tuning table.
    """
    (N, D), J = hidden_ND.shape, router_JD.size(0)
    tile = tile or tile_of("norm_router_backward", hidden_ND.device, J - 1, D)
    size, chunks = chunks_of(N, BACKWARD_PROGRAMS, tile.items)
    grad_hidden_ND = torch.empty_like(hidden_ND)
    parts_CD = torch.empty((chunks, D), device=hidden_ND.device, dtype=torch.float32)
    if N:
        backward_kernel[(chunks,)](
            *(hidden_ND, gain_D, router_JD, gradient_ND, grad_logits_NJ, scale_N, grad_hidden_ND, parts_CD),
            *(N, size, J),
            D=D,
            D_PAD=triton.next_power_of_2(D),
            BN=tile.items,
            num_warps=tile.warps,
            enable_fp_fusion=True,
        )
    return grad_hidden_ND, parts_CD.sum(0).to(gain_D.dtype)


class _NormRouter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, gain_D: Tensor, router_JD: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        hidden_ND, gain_D, router_JD = hidden_ND.contiguous(), gain_D.contiguous(), router_JD.contiguous()
        normed_ND, logits_NJ, scale_N = norm_router_forward(hidden_ND, gain_D, router_JD, eps)
        ctx.save_for_backward(hidden_ND, gain_D, router_JD, normed_ND, scale_N)
        return normed_ND, logits_NJ

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient_ND, grad_logits_NJ = (gradient.contiguous() for gradient in gradients)
        hidden_ND, gain_D, router_JD, normed_ND, scale_N = ctx.saved_tensors
        grad_hidden_ND, grad_gain_D = norm_router_backward(
            hidden_ND, gain_D, router_JD, scale_N, gradient_ND, grad_logits_NJ
        )
        grad_router_JD = None
        if ctx.needs_input_grad[2]:
            grad_router_JD = router_gradient(normed_ND, grad_logits_NJ).to(router_JD.dtype)
        return grad_hidden_ND, grad_gain_D, grad_router_JD, None


def norm_and_route(hidden_ND: Tensor, gain_D: Tensor, router_JD: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Like `tide_mega.kernels.norm_router.norm_and_route`.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    width = hidden_ND.size(-1)
    if hidden_ND.dim() != 2 or gain_D.shape != (width,) or router_JD.dim() != 2 or router_JD.size(1) != width:
        raise ValueError(
            f"hidden {list(hidden_ND.shape)}, gain {list(gain_D.shape)} and router {list(router_JD.shape)} must "
            f"be [N, D], [D] and [J, D]."
        )
    if router_JD.dtype != hidden_ND.dtype:
        raise ValueError(f"hidden is {hidden_ND.dtype} and router {router_JD.dtype}: both must be the same.")
    return _NormRouter.apply(hidden_ND, gain_D, router_JD, eps)
