"""Rules on sizes that must divide each other, combinations that the engines support, and device memory."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product
from typing import Any

from tide_mega.config.device_memory import device_memory
from tide_mega.config.schema import TideConfig
from tide_mega.config.sizes import data_parallel_size, microbatches_per_step
from tide_mega.errors import ConfigError, refuse

MAX_BLOCKS = 64
REFUSED_ZERO3: tuple[tuple[str, Callable[[TideConfig], bool], str], ...] = (
    (
        "parallel.pipeline",
        lambda config: config.parallel.pipeline > 1,
        "where a check of DeepSpeed's broadcasts to every stage and hangs",
    ),
    (
        "memory.owners",
        lambda config: config.memory.owners == "tensor_data",
        "whose own optimizer cannot share ZeRO-3's clip factor",
    ),
)
"""What ZeRO-3 cannot be combined with: a key, a test of its value, and the reason."""


def _either(values: Iterable[object]) -> str:
    *most, last = [str(value) for value in values]
    return f"{', '.join(most)} or {last}" if most else last


def _divisors(*numbers: int) -> list[int]:
    """Return the common divisors, ascending."""
    common = math.gcd(*numbers)
    return [n for n in range(1, common + 1) if common % n == 0]


def check_model(config: TideConfig) -> None:
    """Refuse head, group and memory sizes with which the model cannot be built."""
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
        refuse(
            "model.num_query_groups",
            model.num_query_groups,
            f"does not divide model.num_attention_heads={heads}",
            f"use {_either(_divisors(heads))}",
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
    """Refuse shapes that do not divide over the parallel groups, and combinations that no engine supports."""
    _check_tensor(config)
    _check_pipeline(config)
    _check_zero(config)


def _check_tensor(config: TideConfig) -> None:
    model, parallel, tensor = config.model, config.parallel, config.parallel.tensor
    shared = {
        name: getattr(model, name) for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size")
    }
    for name, size in shared.items():
        if size % tensor:
            remedy = f"use {_either(n for n in _divisors(*shared.values()) if n <= 8)}"
            refuse("parallel.tensor", tensor, f"does not divide model.{name}={size}", remedy)
    if (rows := model.vocab_size) % tensor:
        remedy = f"pad it to {math.ceil(rows / tensor) * tensor}"
        refuse("model.vocab_size", rows, f"does not divide over parallel.tensor={tensor}", remedy)
    if parallel.sequence_parallel and tensor == 1:
        refuse(
            "parallel.sequence_parallel",
            "true",
            "shards over the tensor-parallel group, and parallel.tensor=1",
            "use parallel.tensor=2 or more, or sequence_parallel=false",
        )
    if parallel.sequence_parallel and (length := config.data.seq_length) % tensor:
        why = f"does not divide over parallel.tensor={tensor} with sequence_parallel"
        refuse("data.seq_length", length, why, f"use {math.ceil(length / tensor) * tensor}")


def _check_pipeline(config: TideConfig) -> None:
    layers, pipeline = config.model.num_layers, config.parallel.pipeline
    chunks = config.parallel.virtual_pipeline
    if chunks > 1 and pipeline == 1:
        refuse(
            "parallel.virtual_pipeline",
            chunks,
            "interleaves the chunks of several stages, and parallel.pipeline=1",
            "use virtual_pipeline=1, or parallel.pipeline=2 or more",
        )
    if layers % pipeline:
        near = [n for n in _divisors(layers) if layers % (n * chunks) == 0 and (n > 1 or chunks == 1)]
        remedy = _either(near) if near else f"{_either(_divisors(layers))} with virtual_pipeline=1"
        refuse("parallel.pipeline", pipeline, f"does not divide model.num_layers={layers}", f"use {remedy}")
    if layers % (pipeline * chunks):
        refuse(
            "parallel.virtual_pipeline",
            chunks,
            f"does not divide the {layers // pipeline} layers of each stage (model.num_layers={layers} over "
            f"parallel.pipeline={pipeline})",
            f"use {_either(_divisors(layers // pipeline))}",
        )


def _check_zero(config: TideConfig) -> None:
    stage = config.parallel.zero_stage
    if stage == 0:
        why = "counts Adam's step twice in bf16 and clips by a wrong norm in fp32 with a pipeline"
        refuse("parallel.zero_stage", 0, why, "use 1, which at data-parallel size 1 costs nothing")
    refused = [(key, why) for key, is_meant, why in REFUSED_ZERO3 if is_meant(config)]
    if stage not in (1, 2, 3):
        refuse("parallel.zero_stage", stage, "does not exist", f"use {'1 or 2' if refused else '1, 2 or 3'}")
    if stage == 3 and refused:
        key, why = refused[0]
        group, name = key.split(".")
        value = getattr(getattr(config, group), name)
        remedy = "use 1 or 2, or memory.owners=tensor" if name == "owners" else "use 1 or 2"
        refuse("parallel.zero_stage", 3, f"does not run with {key}={value}, {why}", remedy)


def check_world(config: TideConfig, world_size: int) -> None:
    """Refuse a number of processes over which parallel sizes, batch or tables do not divide."""
    model_size = config.parallel.tensor * config.parallel.pipeline
    if world_size % model_size:
        refuse(
            "parallel.tensor",
            config.parallel.tensor,
            f"times parallel.pipeline={config.parallel.pipeline} does not divide {world_size} process(es)",
            f"start a multiple of {model_size} processes",
        )
    _check_batch(config, world_size)
    _check_window(config, world_size)


def _check_batch(config: TideConfig, world_size: int) -> None:
    """Refuse a batch that is not whole micro-batches, or not as many as the pipeline schedule needs."""
    replicas, micro = data_parallel_size(config, world_size), config.trainer.micro_batch_size
    why = f"is not a multiple of micro_batch_size={micro} times {replicas} data-parallel rank(s)"
    unit, remedy = micro * replicas, "or another trainer.micro_batch_size"
    if config.parallel.virtual_pipeline > 1:
        stages = config.parallel.pipeline
        unit, remedy = unit * stages, "or parallel.virtual_pipeline=1"
        why += f" times parallel.pipeline={stages}, as the interleaved schedule needs"
    batch = config.trainer.global_batch_size
    if batch % unit:
        near = _either([n for n in (batch // unit * unit, (batch // unit + 1) * unit) if n])
        refuse("trainer.global_batch_size", batch, why, f"use {near}, {remedy}")


def _check_window(config: TideConfig, world_size: int) -> None:
    """Refuse windows that do not fill a step, or that the pipeline schedule or the early exchange cannot run."""
    window, step = config.memory.window, microbatches_per_step(config, world_size)
    if window is None or window == step:
        return
    if config.memory.exchange_ahead and window < step:
        why = f"reaches a step's first window alone, and memory.window={window} of its {step} microbatches"
        refuse("memory.exchange_ahead", "true", why, "use memory.window=null, or exchange_ahead=false")
    interleaved = config.parallel.virtual_pipeline > 1
    unit = config.parallel.pipeline if interleaved else 1
    allowed = [n for n in _divisors(step) if n % unit == 0]
    if window in allowed:
        return
    near = [*[n for n in allowed if n < window][-1:], *[n for n in allowed if n > window][:1], "null"]
    why = f"does not divide the {step} microbatch(es) that a data-parallel rank has in a step"
    if step % window == 0:
        why = f"is not a multiple of parallel.pipeline={unit}, as the interleaved schedule needs"
    refuse("memory.window", window, why, f"use {_either(near)}")


def check_memory_fit(config: TideConfig, world_size: int) -> None:
    """Refuse a run that exceeds `cluster.memory_gb` by the estimate of tide_mega.config.device_memory."""
    limit = config.cluster.memory_gb
    if limit is None or (needed := device_memory(config, world_size)).total / 1e9 <= limit:
        return
    raise ConfigError(
        f"cluster.memory_gb={limit:g} is less than the {needed.total / 1e9:.1f} GB that a step of "
        f"model={config.model.name} with memory.num_blocks={config.memory.num_blocks} needs on the fullest of "
        f"{world_size} device(s), {needed.state / 1e9:.1f} for weights and optimizer and "
        f"{needed.activations / 1e9:.1f} for activations: {_fitting_remedy(config, world_size, limit)}."
    )


def _fitting_remedy(config: TideConfig, world_size: int, limit: float) -> str:
    """Return the smallest set of changes that fits and satisfies all other rules; of equals the cheapest."""
    parallel, memory, trainer = config.parallel, config.memory, config.trainer
    widths = (1, 2, 4, 8)
    remedies: list[tuple[object, ...]] = []
    for micro, owners, window, stage, recompute, tensor, pipeline in product(
        {trainer.micro_batch_size, *(n for n in widths if n < trainer.micro_batch_size)},
        {memory.owners, "tensor_data"} if memory.num_blocks else {memory.owners},
        {memory.window, 1} if memory.num_blocks else {memory.window},
        {parallel.zero_stage, 1, 3},
        {parallel.recompute, "selective", "full"},
        {parallel.tensor, *widths},
        {parallel.pipeline, *widths},
    ):
        topology: dict[str, Any] = {
            "tensor": tensor,
            "pipeline": pipeline,
            "zero_stage": stage,
            "recompute": recompute,
        }
        candidate = replace(
            config,
            parallel=replace(parallel, **topology),
            memory=replace(memory, owners=owners, window=window),
            trainer=replace(trainer, micro_batch_size=micro),
        )
        if device_memory(candidate, world_size).total / 1e9 <= limit and _is_allowed(candidate, world_size):
            changes = [
                *([f"trainer.micro_batch_size={micro}"] if micro != trainer.micro_batch_size else []),
                *([f"memory.owners={owners}"] if owners != memory.owners else []),
                *([f"memory.window={window}"] if window != memory.window else []),
                *(
                    f"parallel.{key}={value}"
                    for key, value in topology.items()
                    if value != getattr(parallel, key)
                ),
            ]
            made_again = ("none", "selective", "full").index(recompute)
            cost = (len(changes), pipeline, tensor, made_again, stage, window is not None, -micro)
            remedies.append((*cost, " with ".join(changes)))
    if not remedies:
        return "use more devices, fewer memory blocks or a smaller model"
    return f"{min(remedies)[-1]} would fit"


def _is_allowed(config: TideConfig, world_size: int) -> bool:
    try:
        check_parallel(config)
        check_world(config, world_size)
    except ConfigError:
        return False
    return True
