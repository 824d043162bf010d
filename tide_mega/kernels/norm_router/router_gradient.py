"""The router's gradient on a GPU: dlogitsᵀ · ñ, in chunks of tokens that are summed in order, without atomics.

Products of a 16-bit dtype are exact, sums are in fp32.

Dimensions: N tokens, D hidden size, J = K + 1 banks, C chunks of tokens. In the kernel BN and BD are the tokens
and the width of a tile, J_PAD the next power of two, at least 16.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tide_mega.kernels.tuning import Tile, tile_of

ROUTER_PROGRAMS = 512
"""Chunks times column tiles. Not derived from the GPU's multiprocessors, on which the sums would then depend."""


@triton.jit
def router_kernel(
    normed_ptr: "Any",
    grad_logits_ptr: "Any",
    router_parts_ptr: "Any",
    N: "Any",
    CHUNK: "Any",
    D: tl.constexpr,
    J: tl.constexpr,
    J_PAD: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """Compute the contribution of CHUNK tokens to BD columns of the router's gradient."""
    columns: tl.constexpr = (D + BD - 1) // BD
    chunk = tl.program_id(0) // columns
    d = tl.program_id(0) % columns * BD + tl.arange(0, BD)
    j = tl.arange(0, J_PAD)
    end = tl.minimum(chunk * CHUNK + CHUNK, N)
    sum_jd = tl.zeros([J_PAD, BD], tl.float32)
    for first in range(chunk * CHUNK, end, BN):
        n = first + tl.arange(0, BN)
        inside_n = n < end
        token_n = n.to(tl.int64)
        normed_nd = tl.load(
            normed_ptr + token_n[:, None] * D + d[None, :],
            mask=inside_n[:, None] & (d < D)[None, :],
            other=0.0,
        )
        grad_jn = tl.load(
            grad_logits_ptr + token_n[None, :] * J + j[:, None],
            mask=(j < J)[:, None] & inside_n[None, :],
            other=0.0,
        )
        if INTERPRETED:  # its dot reads the bits of a bfloat16 as an integer
            normed_nd = normed_nd.to(tl.float32)
            grad_jn = grad_jn.to(tl.float32)
        sum_jd = tl.dot(grad_jn, normed_nd, sum_jd, input_precision="ieee")
    part_jd = (chunk.to(tl.int64) * J + j[:, None]) * D + d[None, :]
    tl.store(router_parts_ptr + part_jd, sum_jd, mask=(j < J)[:, None] & (d < D)[None, :])


def router_gradient(normed_ND: Tensor, grad_logits_NJ: Tensor, tile: Tile | None = None) -> Tensor:
    """Return the router's gradient [J, D], fp32, of contiguous tensors; `tile` overrides the tuning table."""
    (N, D), J = normed_ND.shape, grad_logits_NJ.size(1)
    tile = tile or tile_of("router_gradient", normed_ND.device, J - 1, D)
    columns = triton.cdiv(D, tile.width)
    size, chunks = chunks_of(N, max(1, ROUTER_PROGRAMS // columns), tile.items)
    parts_CJD = torch.empty((chunks, J, D), device=normed_ND.device, dtype=torch.float32)
    if N:
        router_kernel[(chunks * columns,)](
            *(normed_ND, grad_logits_NJ, parts_CJD, N, size),
            D=D,
            J=J,
            J_PAD=max(16, triton.next_power_of_2(J)),
            BN=tile.items,
            BD=tile.width,
            INTERPRETED=normed_ND.device.type == "cpu",
            num_warps=tile.warps,
            enable_fp_fusion=True,
            num_stages=tile.stages,
        )
    return parts_CJD.sum(0)


def chunks_of(tokens: int, most: int, of: int) -> tuple[int, int]:
    """Return the tokens per chunk, a multiple of `of`, and the number of chunks."""
    size = max(1, triton.cdiv(triton.cdiv(tokens, most), of)) * of
    return size, triton.cdiv(tokens, size)
