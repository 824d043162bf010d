"""Cross entropy and z-loss in plain torch: all logits at once, in fp32. The oracle.

Dimensions: N tokens, D hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def vocab_loss(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, z_loss: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the mean over labelled tokens of cross entropy + z_loss · log Z² (paper, appendix L).

    Args:
        hidden_ND: input of the output layer.
        weight_VD: the whole output layer.
        labels_N: ids, negative where there is nothing to predict.
        z_loss: weight of the second term.

    Returns:
        The loss (NaN without a labelled token); and without gradient the cross entropy [N] (0 where unlabelled),
        the sum of log Z² and the number of labelled tokens.
    """
    logits_NV = F.linear(hidden_ND.float(), weight_VD.float())
    kept_N = labels_N >= 0
    log_z_N = logits_NV.logsumexp(-1)
    target_N = logits_NV.gather(-1, labels_N.clamp_min(0)[:, None]).squeeze(-1)
    cross_entropy_N = torch.where(kept_N, log_z_N - target_N, 0.0)
    z_square = (log_z_N.square() * kept_N).sum()
    count = kept_N.sum()
    loss = (cross_entropy_N.sum() + z_loss * z_square) / count.clamp_min(1)
    return loss, cross_entropy_N.detach(), z_square.detach(), count
