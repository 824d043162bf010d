"""The mix of a TIDE layer, after its FFN: router softmax, mix by index, feed-forward output and residual in one.

Dimensions: N tokens, D hidden size, K memory blocks, J = K + 1, U distinct token types of the step.
"""

from torch import Tensor

from tide_mega.kernels.mix import cpu, naive
from tide_mega.kernels.row_gradient.sink import RowGradient, deliver
from tide_mega.kernels.token_order import TokenOrder

__all__ = ["mix"]


def mix(
    version: str,
    logits_NJ: Tensor,
    residual: Tensor,
    ffn: Tensor,
    rows_UKD: Tensor,
    order: TokenOrder,
    sink: RowGradient | None,
) -> tuple[Tensor, Tensor]:
    """Return h̃ + FFN + Σ_k α_k M_k (paper 3.5, 3.6) and α.

    Args:
        version: naive, cpu or triton.
        logits_NJ: router logits, the null bank's last.
        residual: hidden state after attention, [..., D] with N leading positions.
        ffn: the feed-forward network's output, the same shape.
        rows_UKD: normalised memory rows; their gradient goes to `sink`, not through autograd.
        order: the tokens' rows.
        sink: collects the gradient of the rows; None if no gradient is wanted.

    Returns:
        The layer's output, shaped as `residual`, and α [N, J] in fp32, detached.
    """
    if version == "triton":
        from tide_mega.kernels.mix.triton import fused_mix

        return fused_mix(logits_NJ, residual, ffn, rows_UKD, order, sink)
    in_torch = {"naive": naive, "cpu": cpu}[version]
    injected_ND, alpha_NJ = in_torch.inject(logits_NJ, rows_UKD.detach(), order.index_N)
    if sink is not None:
        injected_ND = deliver(injected_ND, alpha_NJ, order, sink)
    return residual + (ffn + injected_ND.view_as(residual).to(residual.dtype)), alpha_NJ
