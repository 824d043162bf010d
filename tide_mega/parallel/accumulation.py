"""Local gradients of one optimizer step before data-parallel reduction."""

from collections.abc import Iterable

import torch
from torch import nn

from tide_mega.parallel.groups import ParallelGroups, sum_over


class GradientAccumulator:
    """Accumulates micro-batches in fp32, and completes gradients that sequence parallelism leaves partial.

    Autograd accumulates `.grad` in the parameter's dtype: in bf16 the tenth micro-batch already loses most of its
    contribution. With `widen` the sum is kept in fp32 and rounded once, when the step's gradient is complete.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], groups: ParallelGroups, *, widen: bool = False
    ) -> None:
        self._parameters = list(parameters)
        self._groups = groups
        self._sums: dict[nn.Parameter, torch.Tensor] = {}
        self._hooks = []
        if widen:
            self._hooks = [p.register_post_accumulate_grad_hook(self._absorb) for p in self._parameters]

    def _absorb(self, parameter: torch.Tensor) -> None:
        if not isinstance(parameter, nn.Parameter) or parameter.grad is None:
            return
        if parameter in self._sums:
            self._sums[parameter].add_(parameter.grad)
        else:
            self._sums[parameter] = parameter.grad.float()
        parameter.grad = None

    def finish(self) -> None:
        """Put each parameter's complete local gradient in `.grad`; call after the last backward pass of a step."""
        self._complete_sequence_slices()
        self._join_tied_copies()
        for parameter, total in self._sums.items():
            parameter.grad = total.to(parameter.dtype)
        self._sums.clear()

    def _complete_sequence_slices(self) -> None:
        """Add the parts that each tensor rank saw of the gradient of norms and routers.

        Under sequence parallelism these replicated parameters work on a slice of the sequence. Megatron's own
        optimizer adds the parts; DeepSpeed does not know them.
        """
        gradients = self._marked("sequence_parallel")
        if not gradients or self._groups.tensor_size == 1:
            return
        flat = sum_over(self._groups.tensor, torch.cat([g.flatten().float() for g in gradients]))
        pieces = flat.split([gradient.numel() for gradient in gradients])
        for gradient, piece in zip(gradients, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))

    def _join_tied_copies(self) -> None:
        """Sum the gradients of the embedding and of its tied copy on the last stage, in both."""
        if self._groups.embedding is None:
            return
        for gradient in self._marked("shared_embedding"):
            sum_over(self._groups.embedding, gradient)

    def _marked(self, attribute: str) -> list[torch.Tensor]:
        marked = [p for p in self._parameters if getattr(p, attribute, False)]
        held = [self._sums.get(p, p.grad) for p in marked]
        return [gradient for gradient in held if gradient is not None]

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
