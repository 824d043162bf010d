"""Row gradients accumulated on a GPU: one program per row and stretch of it adds the row's entries in order.

The number of distinct rows stays on the device: a program is launched for every entry, and that of a row's first
entry does the work for all of them.

Dimensions: W rows owned here, Q rows received, X = K · D values of a row.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

STRETCH = 1024
"""Values of a row that one program accumulates."""


@triton.jit
def add_kernel(
    total_ptr: "Any",
    rows_ptr: "Any",
    order_ptr: "Any",
    received_ptr: "Any",
    divisor: "Any",
    Q: "Any",
    X: tl.constexpr,
    BX: tl.constexpr,
) -> None:
    """Add the entries of the row at this position of the sorted rows, if it is the row's first position."""
    columns: tl.constexpr = (X + BX - 1) // BX
    place = tl.program_id(0) // columns
    row = tl.load(rows_ptr + place)
    if tl.load(rows_ptr + place - 1, mask=place > 0, other=-1) == row:
        return
    x = tl.program_id(0) % columns * BX + tl.arange(0, BX)
    inside_x = x < X
    total_x = total_ptr + row.to(tl.int64) * X + x
    sum_x = tl.load(total_x, mask=inside_x, other=0.0)
    here = row
    while here == row:
        entry = tl.load(order_ptr + place).to(tl.int64)
        value_x = tl.load(received_ptr + entry * X + x, mask=inside_x, other=0.0).to(tl.float32)
        sum_x += tl.div_rn(value_x, divisor)
        place += 1
        here = tl.load(rows_ptr + place, mask=place < Q, other=-1)
    tl.store(total_x, sum_x, mask=inside_x)


def add_rows(total_WKD: Tensor, rows_Q: Tensor, received_QKD: Tensor, divisor: int) -> None:
    """Like `tide_mega.kernels.row_sum.add_rows`, with the same bits as the oracle.

    Raises:
        ValueError: `total_WKD` is not contiguous fp32, or the entries do not match its shape.
    """
    if total_WKD.dtype != torch.float32 or not total_WKD.is_contiguous():
        raise ValueError(
            f"total_WKD is {total_WKD.dtype} with strides {total_WKD.stride()}: contiguous fp32 is needed."
        )
    if received_QKD.shape != (rows_Q.numel(), *total_WKD.shape[1:]):
        raise ValueError(
            f"{rows_Q.numel()} rows of {list(total_WKD.shape[1:])} were announced, but "
            f"{list(received_QKD.shape)} came."
        )
    if not received_QKD.numel():
        return
    ascending_Q, order_Q = torch.sort(rows_Q, stable=True)
    width = total_WKD[0].numel()
    add_kernel[(rows_Q.numel() * triton.cdiv(width, STRETCH),)](
        *(total_WKD, ascending_Q, order_Q, received_QKD.contiguous(), float(divisor), rows_Q.numel()),
        X=width,
        BX=STRETCH,
        num_warps=4,
        # A fused multiply-add would round once where the oracle rounds twice. The division here would not be
        # fused anyway; the option states the requirement.
        enable_fp_fusion=False,
    )
