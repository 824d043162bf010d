"""The mix on CPU: an embedding bag over the rows, weighted by the router, without materialising [N, K, D].

Dimensions: N tokens, D hidden size, K memory blocks, J = K + 1, U distinct token types of the step.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def inject(logits_NJ: Tensor, rows_UKD: Tensor, index_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σ_k α_k M_k [N, D], differentiable in the logits, and α [N, J] in fp32, detached."""
    blocks = rows_UKD.size(1)
    alpha_NJ = logits_NJ.float().softmax(-1)
    block_K = torch.arange(blocks, dtype=index_N.dtype)
    injected_ND = F.embedding_bag(
        index_N[:, None] * blocks + block_K,
        rows_UKD.flatten(0, 1),
        mode="sum",
        per_sample_weights=alpha_NJ[:, :blocks].to(rows_UKD.dtype),
    )
    return injected_ND, alpha_NJ.detach()
