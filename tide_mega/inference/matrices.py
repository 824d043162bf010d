"""Matrix products with few rows, each weight held in the layout that its device multiplies fastest.

A decoding step reads every weight once, so a product is as fast as its weights stream from memory. On a CPU oneDNN
reads them faster than what `F.linear` calls: in fp32 in any layout, in bf16 in its own.

Shapes: N tokens, O outputs, I inputs.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

INT8_ZERO = 128
"""Zero point of activations, which oneDNN's int8 product takes unsigned."""


class Matrix(ABC):
    """x -> x Wᵀ."""

    @abstractmethod
    def __call__(self, x_NI: Tensor) -> Tensor:
        """Return [N, O]."""


class PlainMatrix(Matrix):
    """A plain tensor, multiplied by torch."""

    def __init__(self, weight_OI: Tensor) -> None:
        self.weight_OI = weight_OI

    def __call__(self, x_NI: Tensor) -> Tensor:
        """See Matrix."""
        return F.linear(x_NI, self.weight_OI)


class OneDnnMatrix(Matrix):
    """A weight multiplied by oneDNN, as Inductor does for frozen weights."""

    def __init__(self, weight_OI: Tensor, pack: bool, rows: int) -> None:
        """Take a weight; `pack` copies it into the best layout for products of `rows` rows."""
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight_OI, rows) if pack else weight_OI

    def __call__(self, x_NI: Tensor) -> Tensor:
        """See Matrix."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x_NI, self._weight, None, "none", [], "")
        return product


class Int8Matrix(Matrix):
    """8-bit weights with a scale per output; activations are rounded to 8 bits with a scale per token.

    oneDNN accumulates the products exactly, so a token's result does not depend on the others.
    """

    def __init__(self, weight_OI: Tensor, rows: int) -> None:
        scale_O = weight_OI.float().abs().amax(1).clamp_min(1e-12) / 127
        codes_OI = torch.round(weight_OI.float() / scale_O[:, None]).to(torch.int8)
        self._packed = torch.ops.onednn.qlinear_prepack(codes_OI, [rows, weight_OI.shape[1]])
        self._scale_O = scale_O
        self._zeros_O = torch.zeros(len(scale_O), dtype=torch.int32)
        self._middle = torch.tensor(INT8_ZERO + 0.5)  # casting rounds down

    def __call__(self, x_NI: Tensor) -> Tensor:
        """See Matrix."""
        wide_NI = x_NI.float()
        scale_N1 = (
            torch.linalg.vector_norm(wide_NI, float("inf"), -1, keepdim=True).clamp_min_(1e-12).div_(127)
        )
        codes_NI = torch.addcdiv(self._middle, wide_NI, scale_N1).to(torch.uint8)
        product_NO: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes_NI, 1.0, INT8_ZERO, self._packed, self._scale_O, self._zeros_O,
            None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return product_NO.mul_(scale_N1).to(x_NI.dtype)


def has_onednn(dtype: torch.dtype) -> bool:
    """Whether this build of torch supports oneDNN products in this precision on this processor."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def has_int8() -> bool:
    """Whether this build of torch has oneDNN's 8-bit integer product."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_prepack")


def make_matrix(
    weight_OI: Tensor, *, rows: int, int8: bool, for_compiler: bool, is_shared: bool = False
) -> Matrix:
    """Wrap a weight, keeping its device and precision.

    Args:
        weight_OI: the weight; ownership passes to the matrix unless it is shared.
        rows: N for which products should be fast.
        int8: whether to round it to 8 bits, on a CPU.
        for_compiler: whether torch.compile must trace the product; oneDNN's layouts are opaque to it.
        is_shared: whether the tensor is also used elsewhere, so that packing it costs a copy.
    """
    if int8:
        return Int8Matrix(weight_OI, rows)
    if weight_OI.device.type != "cpu" or for_compiler or not has_onednn(weight_OI.dtype):
        return PlainMatrix(weight_OI)
    return OneDnnMatrix(weight_OI, pack=not is_shared or weight_OI.dtype == torch.bfloat16, rows=rows)
