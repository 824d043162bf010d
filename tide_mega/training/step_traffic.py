"""Bytes that megatron-core and DeepSpeed move for this rank in one optimizer step, counted from what they do.

In the convention of `tide_mega.memory.traffic`, whose meter counts the memory's own exchanges as they happen. Left
out: votes, norms and flags, less than a kilobyte a step.

Symbols: t tensor ranks, n replicas, P stages; N tokens of a micro-batch, D hidden size, e bytes of an element.
"""

from tide_mega.config.device_memory import element_bytes, widens
from tide_mega.config.schema import TideConfig
from tide_mega.memory.traffic import TrafficMeter, away
from tide_mega.model.stage import TideStage

RECOMPUTED_SUMS = {"none": 0, "selective": 1, "full": 2}
"""Outputs of a layer that are summed over tensor ranks a second time: the MLP's, or attention's too."""


def count_step(meter: TrafficMeter, stage: TideStage, config: TideConfig, microbatches: int) -> None:
    """Count a step of `microbatches` micro-batches on this rank, under `tensor parallel`, `pipeline`, `embedding`
    (the sum over a tied embedding's copies) and `data parallel`."""
    for kind, moved in {
        "tensor parallel": _tensor_parallel(stage, config, microbatches),
        "pipeline": _pipeline(stage, config, microbatches),
        "embedding": _tied_embedding(stage, config),
        "data parallel": _data_parallel(stage, config, microbatches),
    }.items():
        if moved:
            meter.add(kind, moved, moved)


def _tensor_parallel(stage: TideStage, config: TideConfig, microbatches: int) -> float:
    """Sums of activations: of each layer two forward and two backward; under sequence parallelism gathers and
    scatters of half the volume each, and the inputs of products gathered once more in the backward pass."""
    ranks = stage.groups.tensor_size
    if ranks == 1:
        return 0.0
    tokens = config.data.seq_length * config.trainer.micro_batch_size
    state = tokens * config.model.hidden_size * element_bytes(config)
    layers = sum(len(chunk.decoder.layers) for chunk in stage.transformers)
    has_embedding = any(chunk.pre_process for chunk in stage.transformers)
    has_loss = any(chunk.post_process for chunk in stage.transformers)
    again = RECOMPUTED_SUMS[config.parallel.recompute]
    if config.parallel.sequence_parallel:
        moved = away(ranks) * state * (layers * (10 + 2 * again) + 2 * has_embedding + 2 * has_loss)
    else:
        moved = 2 * away(ranks) * state * (layers * (4 + again) + has_embedding + has_loss)
    if has_loss:  # log-partition and target's logit of every token, in fp32, from every rank
        moved += away(ranks) * ranks * 2 * 4 * tokens
    slices = 0
    if config.parallel.sequence_parallel:
        slices = sum(p.numel() for p in stage.parameters() if getattr(p, "sequence_parallel", False))
    return microbatches * moved + 2 * away(ranks) * 4 * slices


def _pipeline(stage: TideStage, config: TideConfig, microbatches: int) -> float:
    """Each micro-batch's hidden state [T, B, D] (its slice under sequence parallelism) crosses each boundary
    between chunks once, and its gradient once the other way."""
    pipeline, stages = stage.groups.pipeline, stage.groups.pipeline.size()
    if stages == 1:
        return 0.0
    tokens = config.data.seq_length * config.trainer.micro_batch_size
    if config.parallel.sequence_parallel:
        tokens //= stage.groups.tensor_size
    state = tokens * config.model.hidden_size * element_bytes(config) * microbatches
    chunks = config.parallel.virtual_pipeline
    out_borders = chunks - (pipeline.rank() == stages - 1)
    in_borders = chunks - (pipeline.rank() == 0)
    # Activations leave over outgoing boundaries and arrive over incoming ones; gradients the other way.
    return float((out_borders + in_borders) * state)


def _tied_embedding(stage: TideStage, config: TideConfig) -> float:
    """The gradients of both copies, summed as they are kept: in fp32 if micro-batches are accumulated in it."""
    group = stage.groups.embedding
    copies = [p for p in stage.parameters() if getattr(p, "shared_embedding", False)]
    if group is None or group.size() == 1 or not copies:
        return 0.0
    world_size = stage.groups.model.size() * stage.groups.data_size
    width = 4 if widens(config, world_size) else element_bytes(config)
    return 2 * away(group.size()) * width * sum(p.numel() for p in copies)


def _data_parallel(stage: TideStage, config: TideConfig, microbatches: int) -> float:
    """ZeRO 1 and 2 in DeepSpeed sum whole gradients, 2 (n - 1) / n of them, and gather the weights, (n - 1) / n;
    ZeRO-3 scatters the gradients and gathers the weights for forward and backward of every micro-batch: an
    upper bound, since it keeps small weights, and those of its last layers, gathered."""
    replicas = stage.groups.data_size
    if replicas == 1:
        return 0.0
    parameters = list(stage.parameters())
    if config.parallel.zero_stage < 3:
        return 3 * away(replicas) * element_bytes(config) * sum(p.numel() for p in parameters)
    elements = sum(int(getattr(p, "ds_numel", p.numel())) for p in parameters)
    return away(replicas) * element_bytes(config) * (1 + 2 * microbatches) * elements
