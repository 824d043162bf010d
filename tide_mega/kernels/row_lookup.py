"""Rows of a table by id, whose gradient is accumulated in fp32 and in a fixed order.

On a CPU torch adds the gradients of a bf16 row one by one in bf16, for both `F.embedding` and `table[ids]`. There
256 + 1 is 256, so the gradient of a frequently used row stops growing. On a GPU `F.embedding` accumulates with
atomics.

Dimensions: V rows of the table, D width, N ids.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, autograd
from torch.autograd.function import once_differentiable

from tide_mega.kernels.token_order import TokenOrder


class _LookUp(autograd.Function):
    @staticmethod
    def forward(ctx: Any, table_VD: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows = table_VD.size(0)
        return F.embedding(ids, table_VD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (ids,) = ctx.saved_tensors
        order = TokenOrder.sort(ids.flatten(), ctx.rows)
        return sum_rows(order, gradients[0].flatten(0, -2)), None


def look_up(table_VD: Tensor, ids: Tensor) -> Tensor:
    """Return the rows [..., D] of `ids` [...], each from 0 to V - 1."""
    return _LookUp.apply(table_VD, ids)


def sum_rows(order: TokenOrder, values_ND: Tensor) -> Tensor:
    """Sum the values of each row's tokens [V, D] in at least fp32, in the tokens' order, rounded once.

    A transposed embedding bag, whose bags are the rows and whose table is the values: a bf16 result needs no
    fp32 copy of its size, and nothing waits for the device.
    """
    return F.embedding_bag(order.sorted_N, values_ND, order.starts_U1[:-1], mode="sum")
