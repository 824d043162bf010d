"""Router softmax, mix by index and residual sum in plain torch: the oracle. Materialises [N, K, D].

Dimensions: N tokens, D hidden size, K memory blocks, J = K + 1, U distinct token types of the step.
"""

from torch import Tensor

from tide_mega.kernels.row_lookup import look_up


def mix(
    logits_NJ: Tensor, residual: Tensor, ffn: Tensor, rows_UKD: Tensor, index_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Return h̃ + FFN + Σ_k α_k M_k (paper 3.5, 3.6), differentiable in every input by autograd.

    Args:
        logits_NJ: router logits, the null bank's last.
        residual: hidden state after attention, [..., D] with N leading positions.
        ffn: the feed-forward network's output, the same shape.
        rows_UKD: normalised memory rows.
        index_N: row of each token.

    Returns:
        The layer's output, shaped as `residual`, and α [N, J] in fp32, detached.
    """
    injected_ND, alpha_NJ = inject(logits_NJ, rows_UKD, index_N)
    # In bf16 the small terms are added first, since each sum is rounded at its own magnitude.
    return residual + (ffn + injected_ND.view_as(residual).to(residual.dtype)), alpha_NJ


def inject(logits_NJ: Tensor, rows_UKD: Tensor, index_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σ_k α_k M_k [N, D], differentiable in both inputs, and α [N, J] in fp32, detached."""
    blocks = rows_UKD.size(1)
    alpha_NJ = logits_NJ.float().softmax(-1)
    rows_NKD = look_up(rows_UKD.flatten(1), index_N).unflatten(1, (blocks, -1))
    injected_ND = (alpha_NJ[:, None, :blocks].to(rows_NKD.dtype) @ rows_NKD).squeeze(1)
    return injected_ND, alpha_NJ.detach()
