"""RMSNorm before the feed-forward network, and the router's logits from its result, in one pass.

Dimensions: N tokens, D hidden size, J = K + 1 banks, the null bank last.
"""

from torch import Tensor

from tide_mega.kernels.norm_router import naive

__all__ = ["norm_and_route"]


def norm_and_route(
    version: str, hidden_ND: Tensor, gain_D: Tensor, router_JD: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return ñ = RMSNorm(hidden) · gain and the router logits W ñ [N, J] (paper 3.5, before the softmax).

    Args:
        version: naive (also for CPUs) or triton.
        hidden_ND: the state after attention.
        gain_D: of the norm.
        router_JD: W.
        eps: of the norm.

    Returns:
        Both in the hidden state's dtype; the logits are computed from the rounded ñ.
    """
    if version == "triton":
        from tide_mega.kernels.norm_router import triton

        return triton.norm_and_route(hidden_ND, gain_D, router_JD, eps)
    return naive.norm_and_route(hidden_ND, gain_D, router_JD, eps)
