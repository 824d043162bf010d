"""The rows' gradient on CPU: an embedding bag turned round, whose bags are rows and whose table is the tokens.

Works through the rows in chunks that stay in the cache while all layers add to them.

Shapes: U rows, K blocks, J = K + 1, N tokens, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tide_mega.kernels.token_order import TokenOrder

CHUNK_VALUES = 1 << 20
"""Values of `total_UKD` in a chunk: 4 MB."""


def add_rows(
    total_UKD: Tensor, order: TokenOrder, alphas_NJ: list[Tensor], gradients_ND: list[Tensor]
) -> None:
    """As `naive.add_rows`, one bag for each row and block: [N, K, D] does not exist."""
    U, K, D = total_UKD.shape
    tokens_E, weights_E, offsets_B = _entries(order, K)
    # Values in the gradient's own precision would round a row's sum once a layer.
    wide_ND = [gradient_ND.float() for gradient_ND in gradients_ND]
    flat = [alpha_NJ.contiguous().view(-1) for alpha_NJ in alphas_NJ]
    starts = order.starts_U1.tolist()
    rows = max(1, CHUNK_VALUES // (K * D))
    for first in range(0, U, rows):
        last = min(first + rows, U)
        begin, end = starts[first] * K, starts[last] * K
        if begin == end:
            continue
        offsets_C = offsets_B[first * K : last * K] - begin
        chunk_CD = total_UKD[first:last].view(-1, D)
        for alpha_M, gradient_ND in zip(flat, wide_ND, strict=True):
            weight_E = alpha_M[weights_E[begin:end]]
            chunk_CD += F.embedding_bag(
                tokens_E[begin:end], gradient_ND, offsets_C, mode="sum", per_sample_weights=weight_E
            )


def _entries(order: TokenOrder, K: int) -> tuple[Tensor, Tensor, Tensor]:
    """List the bags (u, k) one after the other: tokens, positions in alpha_NJ flattened, and where each begins."""
    starts_U1 = order.starts_U1.long()
    counts_B = starts_U1.diff().repeat_interleave(K)
    offsets_B = counts_B.cumsum(0) - counts_B
    bag_E = torch.repeat_interleave(counts_B)
    row_E = bag_E // K
    position_E = torch.arange(bag_E.numel()) - offsets_B[bag_E] + starts_U1[row_E]
    tokens_E = order.sorted_N.long()[position_E]
    return tokens_E, tokens_E * (K + 1) + bag_E % K, offsets_B
