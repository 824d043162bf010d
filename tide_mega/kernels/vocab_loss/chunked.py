"""Cross entropy and z-loss in chunks of tokens; each chunk's gradient is computed while its logits exist.

The output layer is never recomputed: d loss / d logit = (softmax · (1 + 2 z log Z) - one-hot) / count is known
as soon as a chunk's log-partition is, so the forward pass multiplies it into the gradients of hidden states and
weight, and the backward pass only scales those by the incoming gradient.

Dimensions: N tokens, C tokens of a chunk, D hidden size, W vocabulary entries of this rank, R tensor ranks, X =
2C.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from tide_mega.config.device_memory import LOGIT_CHUNK_BYTES
from tide_mega.kernels.vocab_loss.softmax import ChunkSoftmax, chunk_softmax

CPU_CHUNK_TOKENS = 512
"""With fewer, each chunk still passes over the whole gradient of the weight; with more, data leaves the caches."""


def vocab_loss(
    hidden_ND: Tensor,
    weight_WD: Tensor,
    labels_N: Tensor,
    z_loss: float,
    group: ProcessGroup | None = None,
    *,
    chunk_tokens: int | None = None,
    compile_kernels: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the mean over labelled tokens of cross entropy + z_loss · log Z² (paper, appendix L); collective.

    Args:
        hidden_ND: input of the output layer, the same on all ranks of the group. Its gradient is this rank's
            part: the caller sums it over the group.
        weight_WD: this rank's rows of the output layer, in rank order.
        labels_N: ids, negative where there is nothing to predict.
        z_loss: weight of the second term.
        group: the ranks over which the vocabulary is split; None if it is not.
        chunk_tokens: tokens whose logits exist at a time; None chooses by device and size.
        compile_kernels: compile the elementwise work, on CUDA.

    Returns:
        The loss (fp32; NaN without a labelled token); and without gradient the cross entropy [N] (0 where
        unlabelled), the sum of log Z² and the number of labelled tokens.

    Raises:
        ValueError: a label is not in the vocabulary (on CPU; the check would stall a GPU), or shapes do not match.
    """
    ranks, rank = (group.size(), group.rank()) if group is not None else (1, 0)
    check_shapes(hidden_ND, weight_WD, labels_N, ranks)
    wanted = torch.is_grad_enabled()
    return _ChunkedVocabLoss.apply(
        hidden_ND,
        weight_WD,
        labels_N,
        z_loss,
        (wanted and hidden_ND.requires_grad, wanted and weight_WD.requires_grad),
        labels_N - rank * weight_WD.size(0),
        group if ranks > 1 else None,
        chunk_tokens or tokens_of_a_chunk(hidden_ND, weight_WD),
        chunk_softmax(hidden_ND.device, compile_kernels),
    )


def check_shapes(hidden_ND: Tensor, weight_WD: Tensor, labels_N: Tensor, ranks: int) -> None:
    """Raise ValueError if shapes do not match or, on a CPU, a label is not in the vocabulary."""
    tokens, size = hidden_ND.shape
    if labels_N.shape != (tokens,) or weight_WD.size(1) != size:
        raise ValueError(
            f"hidden {tuple(hidden_ND.shape)}, weight {tuple(weight_WD.shape)} and labels "
            f"{tuple(labels_N.shape)} do not fit: give [N, D], [W, D] and [N]"
        )
    vocabulary = weight_WD.size(0) * ranks
    if labels_N.device.type == "cpu" and tokens and (highest := int(labels_N.max())) >= vocabulary:
        raise ValueError(
            f"label {highest} is outside the vocabulary of {vocabulary}: was the data prepared with another "
            "tokenizer, or is model.vocab_size too small?"
        )


def tokens_of_a_chunk(hidden_ND: Tensor, weight_WD: Tensor) -> int:
    """Return the tokens per chunk such that chunks are as equal as possible, within the device's bound."""
    if not hidden_ND.is_cuda:
        return CPU_CHUNK_TOKENS
    most = max(1, LOGIT_CHUNK_BYTES // (weight_WD.size(0) * hidden_ND.element_size()))
    tokens = max(1, hidden_ND.size(0))
    each = math.ceil(tokens / math.ceil(tokens / most))
    multiple = 64 if most >= 64 else 1
    return min(most, math.ceil(each / multiple) * multiple)


class _ChunkedVocabLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_WD: Tensor,
        labels_N: Tensor,
        z_loss: float,
        wanted: tuple[bool, bool],
        local_N: Tensor,
        group: ProcessGroup | None,
        chunk: int,
        softmax: ChunkSoftmax,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        kept_N = labels_N >= 0
        here_N = (local_N >= 0) & (local_N < weight_WD.size(0)) & kept_N
        local_N = local_N.masked_fill(~here_N, 0)
        count = kept_N.sum()
        share_N = kept_N / count.clamp_min(1).float()
        cross_entropy_N, log_z_N = torch.empty_like(share_N), torch.empty_like(share_N)
        grad_ND = torch.empty_like(hidden_ND) if wanted[0] else None
        grad_WD = torch.empty_like(weight_WD, dtype=torch.float32) if wanted[1] else None
        buffer_CW = hidden_ND.new_empty(min(chunk, hidden_ND.size(0)), weight_WD.size(0))
        for first in range(0, hidden_ND.size(0), chunk):
            part = slice(first, first + chunk)
            hidden_CD, local_C, here_C = hidden_ND[part], local_N[part], here_N[part]
            rows_C = torch.arange(hidden_CD.size(0), device=local_C.device)
            logits_CW = torch.mm(hidden_CD, weight_WD.t(), out=buffer_CW[: hidden_CD.size(0)])
            target_C = logits_CW[rows_C, local_C].float().masked_fill_(~here_C, 0.0)
            log_z_C, target_C = _over_ranks(softmax.log_partition(logits_CW), target_C, group)
            cross_entropy_N[part] = torch.where(kept_N[part], log_z_C - target_C, 0.0)
            log_z_N[part] = log_z_C
            if not any(wanted):
                continue
            slope_C = share_N[part] * (1 + 2 * z_loss * log_z_C)
            softmax.gradient_(logits_CW, log_z_C, slope_C)
            # Subtract 1 in fp32: in bf16 the gradient of an almost certain token would vanish.
            at_target_C = ((target_C - log_z_C).exp() * slope_C - share_N[part]).to(logits_CW.dtype)
            logits_CW[rows_C, local_C] = torch.where(here_C, at_target_C, logits_CW[rows_C, local_C])
            if grad_ND is not None:
                torch.mm(logits_CW, weight_WD, out=grad_ND[part])
            if grad_WD is not None:
                _add_product(grad_WD, logits_CW, hidden_CD, is_first=first == 0)
        z_square = (log_z_N.square() * kept_N).sum()
        loss = (cross_entropy_N.sum() + z_loss * z_square) / count.clamp_min(1)
        ctx.save_for_backward(grad_ND, grad_WD)
        ctx.weight_dtype = weight_WD.dtype
        ctx.mark_non_differentiable(cross_entropy_N, z_square, count)
        ctx.set_materialize_grads(False)
        return loss, cross_entropy_N, z_square, count

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        grad_ND, grad_WD = ctx.saved_tensors
        # As a tensor with dimensions: a scalar would be rounded to bf16 before multiplying.
        incoming_11 = grad_outputs[0].view(1, 1)
        if grad_ND is not None:
            grad_ND = grad_ND.mul_(incoming_11)
        if grad_WD is not None:
            grad_WD = grad_WD.mul_(incoming_11).to(ctx.weight_dtype)
        return grad_ND, grad_WD, *(None,) * 7


def _over_ranks(log_z_C: Tensor, target_C: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Combine the log-partitions of all parts of the vocabulary and fetch each target's logit; one collective."""
    if group is None:
        return log_z_C, target_C
    own_X = torch.cat((log_z_C, target_C))
    all_RX = own_X.new_empty(group.size() * own_X.numel())
    dist.all_gather_into_tensor(all_RX, own_X, group=group)
    all_R2C = all_RX.view(group.size(), 2, -1)
    return all_R2C[:, 0].logsumexp(0), all_R2C[:, 1].sum(0)


def _add_product(total_WD: Tensor, grad_CW: Tensor, hidden_CD: Tensor, is_first: bool) -> None:
    """Add gradᵀ · hidden in fp32."""
    beta = 0 if is_first else 1
    if grad_CW.dtype == total_WD.dtype:
        total_WD.addmm_(grad_CW.t(), hidden_CD, beta=beta)
    elif grad_CW.is_cuda:  # torch 2.10 is the first that adds a product of bf16 matrices to an fp32 matrix
        torch.addmm(total_WD, grad_CW.t(), hidden_CD, out_dtype=torch.float32, beta=beta, out=total_WD)
    elif is_first:
        total_WD.copy_(torch.mm(grad_CW.t(), hidden_CD))
    else:
        total_WD.add_(torch.mm(grad_CW.t(), hidden_CD))
