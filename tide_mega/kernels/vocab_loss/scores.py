"""Scores of given tokens, without gradient: their cross entropy, and whether each is the model's first choice.

Of tokens with equal logits, which are frequent in bf16, the lowest id comes first, as in torch.argmax.

Dimensions: N tokens, C tokens of a chunk, D hidden size, W vocabulary entries of this rank, R tensor ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from tide_mega.kernels.vocab_loss.chunked import check_shapes, tokens_of_a_chunk


@torch.no_grad()
def vocab_scores(
    hidden_ND: Tensor,
    weight_WD: Tensor,
    labels_N: Tensor,
    group: ProcessGroup | None = None,
    *,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Score labels chunk by chunk; collective over `group`, with the same result on all its ranks.

    Args:
        hidden_ND: input of the output layer, the same on all ranks of the group.
        weight_WD: this rank's rows of the output layer, in rank order.
        labels_N: ids, negative where there is nothing to score.
        group: the ranks over which the vocabulary is split; None if it is not.
        chunk_tokens: tokens whose logits exist at a time; None chooses by device and size.

    Returns:
        The cross entropy [N] in nats, fp32, 0 where unlabelled; and bool [N], true where the label is the lowest
        of the ids with the largest logit, false where that logit is NaN.

    Raises:
        ValueError: a label is not in the vocabulary (on CPU), or shapes do not match.
    """
    ranks, rank = (group.size(), group.rank()) if group is not None else (1, 0)
    check_shapes(hidden_ND, weight_WD, labels_N, ranks)
    local_N = labels_N - rank * weight_WD.size(0)
    here_N = (local_N >= 0) & (local_N < weight_WD.size(0)) & (labels_N >= 0)
    cross_entropy_N = torch.zeros(labels_N.shape, dtype=torch.float32, device=hidden_ND.device)
    is_top_N = torch.zeros_like(labels_N, dtype=torch.bool)
    # Every rank processes the same chunks of labelled tokens, which are known to all.
    kept = (labels_N >= 0).nonzero().squeeze(1)
    for chosen_C in kept.split(chunk_tokens or tokens_of_a_chunk(hidden_ND, weight_WD)):
        logits_CW = (hidden_ND[chosen_C] @ weight_WD.t()).float()
        target_C = logits_CW.gather(1, local_N[chosen_C].clamp(0, weight_WD.size(0) - 1)[:, None]).squeeze(1)
        target_C = torch.where(here_N[chosen_C], target_C, -torch.inf)
        first_C = logits_CW.argmax(-1)  # the first of equals, on every device
        top_C = logits_CW.gather(1, first_C[:, None]).squeeze(1)
        id_C = first_C + rank * weight_WD.size(0)
        # float64 represents ids exactly.
        own_4C = torch.stack([x_C.double() for x_C in (logits_CW.logsumexp(-1), target_C, top_C, id_C)])
        log_sum_RC, target_RC, top_RC, id_RC = _of_all_ranks(own_4C, group, ranks).unbind(1)
        target_C = target_RC.amax(0)
        cross_entropy_N[chosen_C] = (log_sum_RC.logsumexp(0) - target_C).float()
        winner_C = torch.where(top_RC == top_RC.amax(0), id_RC, torch.inf).amin(0)
        is_top_N[chosen_C] = winner_C == labels_N[chosen_C]
    return cross_entropy_N, is_top_N


def _of_all_ranks(own_4C: Tensor, group: ProcessGroup | None, ranks: int) -> Tensor:
    if ranks == 1:
        return own_4C[None]
    all_R4C = own_4C.new_empty(ranks, *own_4C.shape)
    dist.all_gather_into_tensor(all_R4C.view(-1), own_4C.view(-1), group=group)
    return all_R4C
