"""From a chunk's logits to their log-partition, then to their gradient in the same memory.

Two ways to the same numbers. Compiled for a GPU, where memory traffic decides, the exponentials are made
twice: one read, then one read and write. Without a compiler every operation is a pass of its own, and on a CPU
the exponential is the dearest, so it is made once and kept.

Shapes: C tokens of the chunk, W vocabulary entries of this rank.
"""

from typing import Protocol

import torch
from torch import Tensor

from tide_mega.kernels.compiled import compiled


class ChunkSoftmax(Protocol):
    """`log_partition` then, if wanted, `gradient_`, for one chunk after the other."""

    def log_partition(self, logits_CW: Tensor) -> Tensor:
        """Return log Σ exp over this rank's entries [C] in fp32; may overwrite the logits."""

    def gradient_(self, logits_CW: Tensor, log_z_C: Tensor, slope_C: Tensor) -> None:
        """Put exp(logit - log Z) · slope where the logits were, computed in fp32."""


class CompiledSoftmax:
    """Two kernels made by torch.compile."""

    def __init__(self, device: torch.device) -> None:
        self._log_partition = compiled(log_partition, device, True)
        self._gradient = compiled(softmax_gradient_, device, True)

    def log_partition(self, logits_CW: Tensor) -> Tensor:
        """See ChunkSoftmax; the logits stay."""
        return self._log_partition(logits_CW)

    def gradient_(self, logits_CW: Tensor, log_z_C: Tensor, slope_C: Tensor) -> None:
        """See ChunkSoftmax."""
        self._gradient(logits_CW, log_z_C, slope_C)


def log_partition(logits_CW: Tensor) -> Tensor:
    """Return log Σ exp [C] in fp32."""
    highest_C1 = logits_CW.amax(-1, keepdim=True).float()
    return highest_C1.squeeze(-1) + (logits_CW.float() - highest_C1).exp().sum(-1).log()


def softmax_gradient_(logits_CW: Tensor, log_z_C: Tensor, slope_C: Tensor) -> None:
    """Put exp(logit - log Z) · slope where the logits were."""
    logits_CW.copy_((logits_CW.float() - log_z_C[:, None]).exp() * slope_C[:, None])


class EagerSoftmax:
    """In place, each exponential made once: in the logits' own memory in fp32, in an fp32 copy in bf16."""

    def __init__(self) -> None:
        self._kept: tuple[Tensor, Tensor] | None = None

    def log_partition(self, logits_CW: Tensor) -> Tensor:
        """See ChunkSoftmax; overwrites fp32 logits."""
        highest_C = logits_CW.amax(-1).float()
        exponentials_CW = logits_CW.float().sub_(highest_C[:, None]).exp_()
        self._kept = exponentials_CW, highest_C
        return highest_C + exponentials_CW.sum(-1).log_()

    def gradient_(self, logits_CW: Tensor, log_z_C: Tensor, slope_C: Tensor) -> None:
        """See ChunkSoftmax; of the chunk whose `log_partition` was last."""
        assert self._kept is not None
        exponentials_CW, highest_C = self._kept
        self._kept = None
        factor_C = (highest_C - log_z_C).exp_().mul_(slope_C)
        logits_CW.copy_(exponentials_CW.mul_(factor_C[:, None]))


def chunk_softmax(device: torch.device, compile_kernels: bool) -> ChunkSoftmax:
    """Choose by device."""
    return CompiledSoftmax(device) if compile_kernels and device.type == "cuda" else EagerSoftmax()
