"""torch's RMSNorm, then the router as a matrix product: the oracle, and the version for CPUs.

Dimensions: N tokens, D hidden size, J = K + 1 banks, the null bank last.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _Route(torch.autograd.Function):
    """Sums the input's gradients of both uses in one pass; autograd would write the router's part first."""

    @staticmethod
    def forward(ctx: Any, normed_ND: Tensor, router_JD: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(normed_ND, router_JD)
        return normed_ND.view_as(normed_ND), F.linear(normed_ND, router_JD)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        grad_ND, grad_NJ = gradients
        normed_ND, router_JD = ctx.saved_tensors
        return torch.addmm(grad_ND, grad_NJ, router_JD), grad_NJ.T @ normed_ND


def route(normed_ND: Tensor, router_JD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the input, which must be used from here on, and its router logits [N, J]."""
    return _Route.apply(normed_ND, router_JD)


def norm_and_route(hidden_ND: Tensor, gain_D: Tensor, router_JD: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Like `tide_mega.kernels.norm_router.norm_and_route`."""
    return route(F.rms_norm(hidden_ND, gain_D.shape, gain_D, eps), router_JD)
