"""Router softmax and mix by index in clear torch: the oracle, and the version every device can run.

Shapes: N tokens, D hidden size, K memory blocks, U distinct token types of the step.
"""

import torch.nn.functional as F
from torch import Tensor


def mix_by_index(
    normed_ND: Tensor, router_JD: Tensor, memory_UKD: Tensor, index_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Weigh each token's memory blocks by its router and sum them (paper 3.5, 3.6).

    Args:
        normed_ND: RMSNorm of the post-attention hidden state, the router's input.
        router_JD: router weights of this layer, J = K + 1 rows, the null bank's last.
        memory_UKD: normalised memory rows of the step's distinct types, fp32 so that the gradients of all layers
            and microbatches add up in fp32.
        index_N: row of `memory_UKD` for each token, int64.

    Returns:
        The injection m [N, D] in the dtype of `normed_ND`, and the null bank's weight [N] in fp32.
    """
    alpha_NJ = F.linear(normed_ND, router_JD).float().softmax(-1)
    blocks = memory_UKD.size(1)
    rows_UX = memory_UKD.to(normed_ND.dtype).flatten(1)
    rows_NKD = F.embedding(index_N, rows_UX).view(index_N.numel(), blocks, -1)
    weights_N1K = alpha_NJ[:, None, :blocks].to(rows_NKD.dtype)
    return (weights_N1K @ rows_NKD).squeeze(1), alpha_NJ[:, blocks].detach()
