"""The rows' gradient on CPU: a transposed embedding bag, whose bags are rows and whose table is the tokens.

It processes the rows in chunks that stay in the cache while all layers add to them, block by block: the tokens
sorted by row are the bags of every block without rearrangement.

Dimensions: U rows, K blocks, J = K + 1, N tokens, D width; C rows of a chunk, E tokens of its rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tide_mega.kernels.token_order import TokenOrder

CHUNK_VALUES = 1 << 19
"""Values of `total_UKD` in a chunk: 2 MB."""


def add_rows(
    total_UKD: Tensor, order: TokenOrder, alphas_NJ: list[Tensor], gradients_ND: list[Tensor]
) -> None:
    """Like `naive.add_rows`, with one bag per block and row; [N, K, D] is never materialised."""
    U, K, D = total_UKD.shape
    # Values in the gradient's own precision would round a row's sum once per layer.
    wide_ND = [gradient_ND.float() for gradient_ND in gradients_ND]
    sorted_KN = [alpha_NJ[:, :K].index_select(0, order.sorted_N).t().contiguous() for alpha_NJ in alphas_NJ]
    starts, block_K1 = order.starts_U1.tolist(), torch.arange(K, dtype=torch.int32)[:, None]
    rows = max(1, CHUNK_VALUES // (K * D))
    for first in range(0, U, rows):
        last = min(first + rows, U)
        begin, end = starts[first], starts[last]
        if begin == end:
            continue
        tokens_KE = order.sorted_N[begin:end].repeat(K)
        bags_KC = (order.starts_U1[first:last] - begin + block_K1 * (end - begin)).flatten()
        chunk_KCD = total_UKD[first:last].transpose(0, 1)
        for alpha_KN, gradient_ND in zip(sorted_KN, wide_ND, strict=True):
            weights_KE = alpha_KN[:, begin:end].flatten()
            sums_KCD = F.embedding_bag(
                tokens_KE, gradient_ND, bags_KC, mode="sum", per_sample_weights=weights_KE
            )
            chunk_KCD += sums_KCD.view_as(chunk_KCD)
