"""Bytes of a step that the libraries move: activations between stages, and data parallelism."""

from tide_mega.config.schema import TideConfig
from tide_mega.memory.meter import TrafficMeter, size
from tide_mega.model.stage import TideStage

BYTES = {"fp32": 4, "bf16": 2}


def count_step(meter: TrafficMeter, stage: TideStage, config: TideConfig, microbatches: int) -> None:
    """Count what megatron's schedule and DeepSpeed's ZeRO move for this rank in one optimizer step.

    Pipeline: each microbatch's hidden state [T, B, D] (its slice under sequence parallelism) crosses each border
    between chunks once forward, and its gradient once back. Data parallel over n replicas: the gradient is
    reduced to its owner and the weights gathered from theirs, (n - 1) / n of each; ZeRO-3 gathers the weights
    for the forward and the backward pass of every microbatch instead.
    """
    pipeline, stages = stage.groups.pipeline, stage.groups.pipeline.size()
    width = BYTES[config.trainer.precision]
    if stages > 1:
        tokens = config.data.seq_length * config.trainer.micro_batch_size
        if config.parallel.sequence_parallel:
            tokens //= stage.groups.tensor_size
        tensor = tokens * config.model.hidden_size * width * microbatches
        chunks = config.parallel.virtual_pipeline
        out_borders = chunks - (pipeline.rank() == stages - 1)
        in_borders = chunks - (pipeline.rank() == 0)
        # Forward leaves over the out borders and arrives over the in borders; gradients the other way.
        crossing = (out_borders + in_borders) * tensor
        meter.add("pipeline", crossing, crossing)
    replicas = stage.groups.data_size
    if replicas > 1:
        weights = sum(size(parameter) for parameter in stage.parameters())
        if config.parallel.zero_stage == 3:
            weights = sum(getattr(p, "ds_numel", p.numel()) * width for p in stage.parameters())
        gathers = 2 * microbatches if config.parallel.zero_stage == 3 else 1
        moved = (1 + gathers) * weights * (replicas - 1) / replicas
        meter.add("data parallel", moved, moved)
