"""Runs micro-batches through the pipeline: the only user of megatron-core's schedules."""

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
    """Run forward, and unless `forward_only` backward, of every micro-batch on every pipeline stage.

    Args:
        forward_step: takes the iterator and the model; returns the model's output and a function from the output
            to (loss, extras). Megatron divides that loss by the number of micro-batches.
        microbatches: what the iterator yields, in order; the same number on every rank.
        chunks: this stage's megatron modules (with `config`, `set_input_tensor`), not the DeepSpeed engine;
        several
            with the interleaved schedule, where each gets its own iterator.
        seq_length: tokens of a sequence, the T of tensors sent between stages.
        forward_only: for evaluation; builds no graph.

    Returns:
        The extras of each micro-batch; on the last pipeline stage only.
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
