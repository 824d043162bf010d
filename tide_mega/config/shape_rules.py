"""Rules on sizes that must divide each other, and on what fits a device."""

import math
from dataclasses import replace

from tide_mega.config.errors import ConfigError, refuse
from tide_mega.config.schema import TideConfig
from tide_mega.config.sizes import bytes_per_device, data_parallel_size

MAX_BLOCKS = 64


def _divisors_up_to_8(*numbers: int) -> str:
    divisors = [str(n) for n in range(1, 9) if all(number % n == 0 for number in numbers)]
    return divisors[0] if len(divisors) == 1 else f"{', '.join(divisors[:-1])} or {divisors[-1]}"


def check_model(config: TideConfig) -> None:
    """Refuse head, group and memory sizes that the model cannot be built with."""
    model, memory = config.model, config.memory
    heads, width = model.num_attention_heads, model.hidden_size
    if width % heads:
        refuse(
            "model.hidden_size",
            width,
            f"does not divide into model.num_attention_heads={heads} heads",
            f"use {width // heads * heads or heads} or {(width // heads + 1) * heads}",
        )
    if width // heads % 2:
        refuse(
            "model.num_attention_heads",
            heads,
            f"gives heads of {width // heads} channels, and rotary embedding turns pairs",
            "choose a head count that leaves an even head size",
        )
    if heads % model.num_query_groups:
        allowed = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        refuse(
            "model.num_query_groups",
            model.num_query_groups,
            f"does not divide model.num_attention_heads={heads}",
            f"use one of {allowed}",
        )
    if memory.num_blocks > MAX_BLOCKS:
        refuse("memory.num_blocks", memory.num_blocks, "is too many", f"use 0 to {MAX_BLOCKS}")
    if memory.width is not None and memory.width != width:
        refuse(
            "memory.width",
            memory.width,
            f"differs from model.hidden_size={width}, and the paper defines injection only for equal widths",
            f"use null or {width}",
        )


def check_parallel(config: TideConfig) -> None:
    """Refuse shapes that do not divide over the parallel groups, and combinations the engines refuse."""
    model, parallel = config.model, config.parallel
    tensor = parallel.tensor
    shared = (model.num_attention_heads, model.num_query_groups, model.ffn_hidden_size)
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        if getattr(model, name) % tensor:
            refuse(
                "parallel.tensor",
                tensor,
                f"does not divide model.{name}={getattr(model, name)}",
                f"use {_divisors_up_to_8(*shared)}",
            )
    if model.vocab_size % tensor:
        refuse(
            "model.vocab_size",
            model.vocab_size,
            f"does not divide over parallel.tensor={tensor}",
            f"pad it to {math.ceil(model.vocab_size / tensor) * tensor}",
        )
    if model.num_layers % parallel.pipeline:
        refuse(
            "parallel.pipeline",
            parallel.pipeline,
            f"does not divide model.num_layers={model.num_layers}",
            f"use {_divisors_up_to_8(model.num_layers)}",
        )
    if parallel.pipeline > 1:
        refuse("parallel.pipeline", parallel.pipeline, "is not supported", "this version runs pipeline=1")
    if parallel.sequence_parallel and tensor == 1:
        refuse(
            "parallel.sequence_parallel",
            "true",
            "shards over the tensor-parallel group, and parallel.tensor=1",
            "use parallel.tensor=2 or more, or sequence_parallel=false",
        )
    if parallel.sequence_parallel and config.data.seq_length % tensor:
        refuse(
            "data.seq_length",
            config.data.seq_length,
            f"does not divide over parallel.tensor={tensor} with sequence_parallel",
            f"use {math.ceil(config.data.seq_length / tensor) * tensor}",
        )
    if parallel.zero_stage == 0:
        why = "counts Adam's step twice in bf16 and clips by a wrong norm in fp32"
        refuse("parallel.zero_stage", 0, why, "use 1, also on one process")
    if parallel.zero_stage not in (1, 2):
        refuse("parallel.zero_stage", parallel.zero_stage, "is not supported", "use 1 or 2")


def check_world(config: TideConfig, world_size: int) -> None:
    """Refuse a number of processes that the parallel sizes or the batch do not divide over."""
    model_size = config.parallel.tensor * config.parallel.pipeline
    if world_size % model_size:
        refuse(
            "parallel.tensor",
            config.parallel.tensor,
            f"times parallel.pipeline={config.parallel.pipeline} does not divide {world_size} process(es)",
            f"start a multiple of {model_size} processes",
        )
    replicas, micro = data_parallel_size(config, world_size), config.trainer.micro_batch_size
    batch, unit = config.trainer.global_batch_size, micro * replicas
    if batch % unit:
        near = f"{batch // unit * unit} or {(batch // unit + 1) * unit}" if batch > unit else str(unit)
        refuse(
            "trainer.global_batch_size",
            batch,
            f"is not a multiple of micro_batch_size={micro} times {replicas} data-parallel rank(s)",
            f"use {near}, or another trainer.micro_batch_size",
        )


def check_memory_fit(config: TideConfig, world_size: int) -> None:
    """Refuse what cannot fit `cluster.memory_gb`; activations are not in it, so passing is no promise."""
    limit = config.cluster.memory_gb
    if limit is None or (needed := bytes_per_device(config, world_size) / 1e9) <= limit:
        return
    raise ConfigError(
        f"cluster.memory_gb={limit:g} is less than the {needed:.1f} GB that weights, gradients and optimizer "
        f"state of model={config.model.name} with memory.num_blocks={config.memory.num_blocks} need on each "
        f"of {world_size} device(s): {_fitting_remedy(config, world_size, limit)}."
    )


def _fitting_remedy(config: TideConfig, world_size: int, limit: float) -> str:
    model = config.model
    shared = (model.num_attention_heads, model.num_query_groups, model.ffn_hidden_size, model.vocab_size)
    for tensor in (1, 2, 4, 8):
        if world_size % tensor or any(number % tensor for number in shared):
            continue
        for stage in (1, 2):
            parallel = replace(config.parallel, tensor=tensor, zero_stage=stage)
            if bytes_per_device(replace(config, parallel=parallel), world_size) / 1e9 <= limit:
                return f"parallel.tensor={tensor} with parallel.zero_stage={stage} would fit"
    return "use more devices, fewer memory blocks, a wider parallel.tensor or a smaller model"
