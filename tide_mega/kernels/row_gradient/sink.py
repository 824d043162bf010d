"""Collects what the layers' backward passes leave, and adds it to the rows' gradient one micro-batch at a time.

Dimensions: U rows read, K memory blocks, J = K + 1, N tokens, D width.
"""

from typing import Any

import torch
from torch import Tensor

from tide_mega.kernels.row_gradient import cpu, naive
from tide_mega.kernels.token_order import TokenOrder


class RowGradient:
    """The fp32 gradient of one reading's rows.

    It keeps the layers' output gradients, which autograd has computed anyway, until the micro-batch's last layer
    has left its own: at most N · D values per layer of a stage, less than later layers have freed by then.
    """

    def __init__(self, shape_UKD: torch.Size, device: torch.device, version: str, num_layers: int) -> None:
        """Start empty.

        Args:
            shape_UKD: of the rows.
            device: of the rows.
            version: naive, cpu or triton.
            num_layers: layers of a model chunk, that is the number of contributions that complete a micro-batch.
        """
        self._shape, self._device = shape_UKD, device
        self._version, self._num_layers = version, num_layers
        self._total_UKD: Tensor | None = None
        self._order: TokenOrder | None = None
        self._alphas_NJ: list[Tensor] = []
        self._gradients_ND: list[Tensor] = []

    @property
    def is_empty(self) -> bool:
        """Whether no layer has contributed yet."""
        return self._total_UKD is None and not self._gradients_ND

    def add(self, order: TokenOrder, alpha_NJ: Tensor, gradient_ND: Tensor) -> None:
        """Add one layer's router weights and output gradient, neither of which may change from here on."""
        if self._order is not None and self._order.key != order.key:
            self._flush()
        self._order = order
        self._alphas_NJ.append(alpha_NJ)
        self._gradients_ND.append(gradient_ND)
        if len(self._gradients_ND) == self._num_layers:
            self._flush()

    def total(self) -> Tensor:
        """Return the sum of all contributions so far [U, K, D]."""
        self._flush()
        return self._total()

    def _total(self) -> Tensor:
        if self._total_UKD is None:
            self._total_UKD = torch.zeros(self._shape, device=self._device, dtype=torch.float32)
        return self._total_UKD

    def _flush(self) -> None:
        if self._order is None:
            return
        segmented_sum(self._version)(self._total(), self._order, self._alphas_NJ, self._gradients_ND)
        self._order = None
        self._alphas_NJ, self._gradients_ND = [], []


def segmented_sum(version: str) -> Any:
    """Return the version's `add_rows(total_UKD, order, alphas_NJ, gradients_ND)`."""
    if version == "triton":
        from tide_mega.kernels.row_gradient import triton

        return triton.add_rows
    return {"naive": naive, "cpu": cpu}[version].add_rows


class _Deliver(torch.autograd.Function):
    """Passes an output through; its backward pass adds the gradient to the sink."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, alpha_NJ: Tensor, order: TokenOrder, sink: RowGradient) -> Tensor:
        ctx.save_for_backward(alpha_NJ)
        ctx.order, ctx.sink = order, sink
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        (alpha_NJ,) = ctx.saved_tensors
        ctx.sink.add(ctx.order, alpha_NJ, gradient.flatten(0, -2))
        return gradient, None, None, None


def deliver(out: Tensor, alpha_NJ: Tensor, order: TokenOrder, sink: RowGradient) -> Tensor:
    """Return `out` [..., D]; the sink receives its gradient, with the weights `alpha_NJ`, in the backward pass."""
    return _Deliver.apply(out, alpha_NJ, order, sink)
