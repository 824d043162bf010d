"""Driving microbatches: the one door to megatron-core's pipeline schedules."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from tide_mega.parallel.megatron_cpu import cuda_means_cpu

LossFunction = Callable[[Any], tuple[Tensor, dict[str, Tensor]]]
ForwardStep = Callable[[Iterator[Any], nn.Module], tuple[Tensor, LossFunction]]


def run_microbatches(
    forward_step: ForwardStep,
    microbatches: list[Any],
    chunks: Sequence[nn.Module],
    *,
    seq_length: int,
    forward_only: bool = False,
) -> list[dict[str, Tensor]]:
    """Run forward, and unless `forward_only` backward, of every microbatch on every pipeline stage.

    Args:
        forward_step: takes the iterator and the model, returns the model's output and a function from the
            output to (loss, extras). Megatron divides that loss by the number of microbatches.
        microbatches: what the iterator yields, in order; the same number on every rank.
        chunks: this stage's megatron modules (`config`, `set_input_tensor`), not the DeepSpeed engine; more
            than one with the interleaved schedule, where each is given its own iterator.
        seq_length: tokens of a sequence, the T of the tensors between stages.
        forward_only: evaluation, without a graph.

    Returns:
        The extras of each microbatch; on the last pipeline stage only.
    """
    with cuda_means_cpu():
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(microbatches) for _ in chunks],
            model=list(chunks),
            num_microbatches=len(microbatches),
            seq_length=seq_length,
            micro_batch_size=microbatches[0].micro_batch_size,
            forward_only=forward_only,
        )
