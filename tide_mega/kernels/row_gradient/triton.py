"""The rows' gradient on a GPU: one segmented sum over the tokens of all layers, without atomics.

A program owns a piece of a row (at most C of its tokens) and some columns, and sums over the piece's (layer,
token) pairs: even a row met once gives as many pairs as there are layers. A row of one piece is added directly
to the total; the pieces of longer rows go to slots, which a second kernel adds in order. So every sum has a
fixed order.

16-bit gradients are multiplied on the tensor cores with α split into two parts of the gradient's dtype, α = high
+ low: products are exact, sums in fp32, and the dropped remainder of α is below 2^-16 of it for bfloat16. fp32
stays fp32.

Dimensions: U rows, K blocks, J = K + 1, N tokens, D width, L layers. In the kernels e is a pair of layer and
token, BE and BD the pairs and the width of a tile, K_PAD the next power of two, at least 16.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tide_mega.kernels.row_gradient.pieces import Pieces
from tide_mega.kernels.token_order import TokenOrder
from tide_mega.kernels.tuning import Tile, tile_of

PAIRS_OF_A_PIECE = 1536
"""Large enough for few slots, small enough to keep every multiprocessor busy to the end."""
ALIGNMENT = 16
"""Bytes of the widest load instruction."""


@triton.jit
def pieces_kernel(
    total_ptr: "Any",
    slots_ptr: "Any",
    gradient_ptr: "Any",
    gradients_ptr: "Any",
    alphas_ptr: "Any",
    sorted_ptr: "Any",
    starts_ptr: "Any",
    row_ptr: "Any",
    first_ptr: "Any",
    slot_ptr: "Any",
    U: "Any",
    C: "Any",
    D: tl.constexpr,
    K: tl.constexpr,
    L: tl.constexpr,
    K_PAD: tl.constexpr,
    BE: tl.constexpr,
    BD: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """Sum one piece; `gradient_ptr` only tells the type that the addresses in `gradients_ptr` point to."""
    columns: tl.constexpr = (D + BD - 1) // BD
    piece = tl.program_id(0) // columns
    row = tl.load(row_ptr + piece)
    if row >= U:
        return
    first_place = tl.load(starts_ptr + row) + (piece - tl.load(first_ptr + row)) * C
    pairs = (tl.minimum(first_place + C, tl.load(starts_ptr + row + 1)) - first_place) * L
    k = tl.arange(0, K_PAD)
    d = tl.program_id(0) % columns * BD + tl.arange(0, BD)
    inside_kd = (k < K)[:, None] & (d < D)[None, :]

    sum_kd = tl.zeros([K_PAD, BD], tl.float32)
    for first in range(0, pairs, BE):
        e = first + tl.arange(0, BE)
        inside_e = e < pairs
        token_e = tl.load(sorted_ptr + first_place + e // L, mask=inside_e, other=0).to(tl.int64)
        # Aligned, as the launcher ensures, which makes the loads wide.
        gradient_e = tl.multiple_of(tl.load(gradients_ptr + e % L).to(gradient_ptr.dtype), 16)
        gradient_ed = tl.load(
            gradient_e[:, None] + (token_e[:, None] * D + d[None, :]),
            mask=inside_e[:, None] & (d < D)[None, :],
            other=0.0,
        )
        alpha_e = tl.load(alphas_ptr + e % L).to(tl.pointer_type(tl.float32))
        alpha_ke = tl.load(
            alpha_e[None, :] + (token_e[None, :] * (K + 1) + k[:, None]),
            mask=(k < K)[:, None] & inside_e[None, :],
            other=0.0,
        )
        if gradient_ed.dtype == tl.float32:
            sum_kd = tl.dot(alpha_ke, gradient_ed, sum_kd, input_precision="ieee")
        else:
            high_ke = alpha_ke.to(gradient_ed.dtype)
            low_ke = (alpha_ke - high_ke.to(tl.float32)).to(gradient_ed.dtype)
            if INTERPRETED:  # its dot reads the bits of a bfloat16 as an integer
                parts_ke = high_ke.to(tl.float32) + low_ke.to(tl.float32)
                sum_kd = tl.dot(parts_ke, gradient_ed.to(tl.float32), sum_kd, input_precision="ieee")
            else:
                sum_kd = tl.dot(high_ke, gradient_ed, sum_kd)
                sum_kd = tl.dot(low_ke, gradient_ed, sum_kd)

    slot = tl.load(slot_ptr + row)
    here_kd = k[:, None] * D + d[None, :]
    if slot < 0:
        total_kd = total_ptr + row.to(tl.int64) * (K * D) + here_kd
        tl.store(total_kd, tl.load(total_kd, mask=inside_kd, other=0.0) + sum_kd, mask=inside_kd)
    else:
        slot += piece - tl.load(first_ptr + row)
        tl.store(slots_ptr + slot.to(tl.int64) * (K * D) + here_kd, sum_kd, mask=inside_kd)


@triton.jit
def slots_kernel(
    total_ptr: "Any",
    slots_ptr: "Any",
    starts_ptr: "Any",
    slot_ptr: "Any",
    long_ptr: "Any",
    U: "Any",
    C: "Any",
    KD: tl.constexpr,
    BX: tl.constexpr,
) -> None:
    """Add the slots of one long row, in their order, to BX values of the total."""
    columns: tl.constexpr = (KD + BX - 1) // BX
    row = tl.load(long_ptr + tl.program_id(0) // columns)
    if row >= U:
        return
    x = tl.program_id(0) % columns * BX + tl.arange(0, BX)
    inside_x = x < KD
    tokens = tl.load(starts_ptr + row + 1) - tl.load(starts_ptr + row)
    total_x = total_ptr + row.to(tl.int64) * KD + x
    slot_x = slots_ptr + tl.load(slot_ptr + row).to(tl.int64) * KD + x
    sum_x = tl.zeros([BX], tl.float32)
    for _ in range(0, tokens, C):
        sum_x += tl.load(slot_x, mask=inside_x, other=0.0)
        slot_x += KD
    tl.store(total_x, tl.load(total_x, mask=inside_x, other=0.0) + sum_x, mask=inside_x)


def add_rows(
    total_UKD: Tensor,
    order: TokenOrder,
    alphas_NJ: list[Tensor],
    gradients_ND: list[Tensor],
    tile: Tile | None = None,
    slots_tile: Tile | None = None,
) -> None:
    """Like `naive.add_rows`, with the same bits from run to run; the tiles override the tuning table.

    Temporarily needs up to 2 N L / PAIRS_OF_A_PIECE slots of K · D fp32 values.

    Raises:
        ValueError: `total_UKD` is not contiguous fp32, or the layers' shapes do not fit it.
    """
    U, K, D = total_UKD.shape
    N, L = order.num_tokens, len(gradients_ND)
    _check(total_UKD, order, alphas_NJ, gradients_ND)
    if not (N and L):
        return
    gradients_ND = _readable(gradients_ND)
    alphas_NJ = _readable([alpha_NJ.float() for alpha_NJ in alphas_NJ])
    addresses = _addresses([*gradients_ND, *alphas_NJ], total_UKD.device)
    pieces = Pieces.cut(order, triton.cdiv(PAIRS_OF_A_PIECE, L))
    slots_SKD = torch.empty((pieces.num_slots, K, D), device=total_UKD.device, dtype=torch.float32)
    tile = tile or tile_of("row_gradient", total_UKD.device, K, D)
    slots_tile = slots_tile or tile_of("row_slots", total_UKD.device, K, D)
    pieces_kernel[(pieces.row_P.numel() * triton.cdiv(D, tile.width),)](
        *(total_UKD, slots_SKD, gradients_ND[0], addresses[:L], addresses[L:]),
        *(order.sorted_N, order.starts_U1, pieces.row_P, pieces.first_U, pieces.slot_U),
        *(U, pieces.tokens),
        D=D,
        K=K,
        L=L,
        K_PAD=max(16, triton.next_power_of_2(K)),
        BE=tile.items,
        BD=tile.width,
        INTERPRETED=total_UKD.device.type == "cpu",
        num_warps=tile.warps,
        enable_fp_fusion=True,
        num_stages=tile.stages,
    )
    if pieces.long_M.numel():
        slots_kernel[(pieces.long_M.numel() * triton.cdiv(K * D, slots_tile.width),)](
            *(total_UKD, slots_SKD, order.starts_U1, pieces.slot_U, pieces.long_M, U, pieces.tokens),
            KD=K * D,
            BX=slots_tile.width,
            num_warps=slots_tile.warps,
            enable_fp_fusion=True,
        )


def _check(total_UKD: Tensor, order: TokenOrder, alphas_NJ: list[Tensor], gradients_ND: list[Tensor]) -> None:
    U, K, D = total_UKD.shape
    N = order.num_tokens
    if total_UKD.dtype != torch.float32 or not total_UKD.is_contiguous():
        raise ValueError(
            f"total_UKD is {total_UKD.dtype} with strides {total_UKD.stride()}: contiguous fp32 is needed."
        )
    if order.num_rows != U or len(alphas_NJ) != len(gradients_ND):
        raise ValueError(
            f"total_UKD has {U} rows and the order {order.num_rows}; {len(alphas_NJ)} layers gave weights and "
            f"{len(gradients_ND)} gradients: both pairs must be equal."
        )
    for layer, (alpha_NJ, gradient_ND) in enumerate(zip(alphas_NJ, gradients_ND, strict=True)):
        if alpha_NJ.shape != (N, K + 1) or gradient_ND.shape != (N, D):
            raise ValueError(
                f"contribution {layer} has weights {list(alpha_NJ.shape)} and gradient {list(gradient_ND.shape)}: "
                f"[{N}, {K + 1}] and [{N}, {D}] are needed."
            )


def _readable(layers: list[Tensor]) -> list[Tensor]:
    """Return the layers' tensors, copied only if not contiguous, not aligned or of several dtypes."""
    if len({layer.dtype for layer in layers}) > 1:
        layers = [layer.float() for layer in layers]
    layers = [layer.contiguous() for layer in layers]
    return [layer.clone() if layer.data_ptr() % ALIGNMENT else layer for layer in layers]


def _addresses(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Return the tensors' addresses as int64 on the device; copied from pinned memory without waiting."""
    addresses = [tensor.data_ptr() for tensor in tensors]
    pinned = torch.tensor(addresses, dtype=torch.int64, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)
