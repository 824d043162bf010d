"""The target's logit out of vocab-parallel logits, which turns a cross entropy into a log-partition.

Shapes: T tokens, B sequences, N = T * B, W vocabulary entries of this rank.
"""

from typing import Any

import torch
from megatron.core import tensor_parallel
from torch import Tensor
from torch.distributed import ProcessGroup


class _PickTargets(torch.autograd.Function):
    """Hands the logits through and picks one of each token.

    Its backward adds N numbers to the gradient that comes back for the logits, in place: indexing by
    autograd would allocate and add a second dense [T, B, W] gradient.
    """

    @staticmethod
    def forward(ctx: Any, logits_TBW: Tensor, local_N: Tensor, elsewhere_N: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(local_N, elsewhere_N)
        rows_N = torch.arange(local_N.numel(), device=local_N.device)
        picked_N = logits_TBW.flatten(0, 1)[rows_N, local_N].float().masked_fill(elsewhere_N, 0.0)
        return logits_TBW.detach(), picked_N

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        grad_TBW, grad_picked_N = grad_outputs
        local_N, elsewhere_N = ctx.saved_tensors
        rows_N = torch.arange(local_N.numel(), device=local_N.device)
        grad_TBW = grad_TBW.contiguous()
        grad_TBW.flatten(0, 1)[rows_N, local_N] += grad_picked_N.masked_fill(elsewhere_N, 0.0).to(
            grad_TBW.dtype
        )
        return grad_TBW, None, None


def pick_targets(logits_TBW: Tensor, labels_TB: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Return the logits, to be used from here on, and each label's logit [T, B] in fp32.

    Args:
        logits_TBW: this rank's part of the vocabulary.
        labels_TB: ids; one outside the vocabulary (padding) picks 0.
        group: the ranks among which the vocabulary is split.
    """
    size = logits_TBW.size(-1)
    local_N = labels_TB.flatten() - group.rank() * size
    elsewhere_N = (local_N < 0) | (local_N >= size)
    local_N = local_N.masked_fill(elsewhere_N, 0)
    logits_TBW, picked_N = _PickTargets.apply(logits_TBW, local_N, elsewhere_N)
    picked_TB = picked_N.view_as(labels_TB)
    return logits_TBW, tensor_parallel.reduce_from_tensor_model_parallel_region(picked_TB, group=group)
