"""From a chunk's logits to their log-partition, then to their gradient in the same memory.

There are two ways to the same numbers. Compiled for a GPU, where memory traffic dominates, the exponentials are
computed twice: one read, then one read and write. Without a compiler every operation is a separate pass, and on
a CPU the exponential is the most expensive, so it is computed once and kept.

Dimensions: C tokens of the chunk, W vocabulary entries of this rank.
"""

from typing import Protocol

import torch
from torch import Tensor

from tide_mega.kernels.compiled import compiled


class ChunkSoftmax(Protocol):
    """Call `log_partition` and then, if wanted, `gradient_`, for one chunk after the other."""

    def log_partition(self, logits_CW: Tensor) -> Tensor:
        """Return log Σ exp over this rank's entries [C] in fp32; may overwrite the logits."""

    def gradient_(self, logits_CW: Tensor, log_z_C: Tensor, slope_C: Tensor) -> None:
        """Overwrite the logits with exp(logit - log Z) · slope, computed in fp32."""


class CompiledSoftmax:
    """Two kernels compiled by torch.compile."""

    def __init__(self, device: torch.device) -> None:
        self._log_partition = compiled(log_partition, device, True)
        self._gradient = compiled(softmax_gradient_, device, True)

    def log_partition(self, logits_CW: Tensor) -> Tensor:
        """See ChunkSoftmax; keeps the logits."""
        return self._log_partition(logits_CW)

    def gradient_(self, logits_CW: Tensor, log_z_C: Tensor, slope_C: Tensor) -> None:
        """See ChunkSoftmax."""
        self._gradient(logits_CW, log_z_C, slope_C)


def log_partition(logits_CW: Tensor) -> Tensor:
    """Return log Σ exp [C] in fp32."""
    highest_C1 = logits_CW.amax(-1, keepdim=True).float()
    return highest_C1.squeeze(-1) + (logits_CW.float() - highest_C1).exp().sum(-1).log()


def softmax_gradient_(logits_CW: Tensor, log_z_C: Tensor, slope_C: Tensor) -> None:
    """Overwrite the logits with exp(logit - log Z) · slope."""
    logits_CW.copy_((logits_CW.float() - log_z_C[:, None]).exp() * slope_C[:, None])


class EagerSoftmax:
    """Computes each exponential once: in place for fp32 logits, in an fp32 copy for bf16."""

    def __init__(self) -> None:
        self._kept: tuple[Tensor, Tensor] | None = None

    def log_partition(self, logits_CW: Tensor) -> Tensor:
        """See ChunkSoftmax; overwrites fp32 logits."""
        highest_C = logits_CW.amax(-1).float()
        exponentials_CW = logits_CW.float().sub_(highest_C[:, None]).exp_()
        self._kept = exponentials_CW, highest_C
        return highest_C + exponentials_CW.sum(-1).log_()

    def gradient_(self, logits_CW: Tensor, log_z_C: Tensor, slope_C: Tensor) -> None:
        """See ChunkSoftmax; for the chunk of the last call of `log_partition`."""
        assert self._kept is not None
        exponentials_CW, highest_C = self._kept
        self._kept = None
        factor_C = (highest_C - log_z_C).exp_().mul_(slope_C)
        logits_CW.copy_(exponentials_CW.mul_(factor_C[:, None]))


def chunk_softmax(device: torch.device, compile_kernels: bool) -> ChunkSoftmax:
    """Return the softmax for a device."""
    return CompiledSoftmax(device) if compile_kernels and device.type == "cuda" else EagerSoftmax()
