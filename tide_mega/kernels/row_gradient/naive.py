"""The rows' gradient in plain torch, one layer and block after the other: the oracle.

Dimensions: U rows, K blocks, J = K + 1, N tokens, D width.
"""

from torch import Tensor

from tide_mega.kernels.row_lookup import sum_rows
from tide_mega.kernels.token_order import TokenOrder


def add_rows(
    total_UKD: Tensor, order: TokenOrder, alphas_NJ: list[Tensor], gradients_ND: list[Tensor]
) -> None:
    """Add Σ over layers and tokens of α[n, k] · dh[n] to the row of each token.

    Args:
        total_UKD: fp32, changed in place.
        order: the tokens' order.
        alphas_NJ: fp32 router weights of each layer, the null bank's last.
        gradients_ND: gradient of each layer's output.
    """
    for alpha_NJ, gradient_ND in zip(alphas_NJ, gradients_ND, strict=True):
        for block in range(total_UKD.size(1)):
            part_ND = alpha_NJ[:, block, None] * gradient_ND.float()
            total_UKD[:, block] += sum_rows(order, part_ND)
