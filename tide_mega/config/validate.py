"""Rules that a configuration must meet before anything is loaded.

Each refusal is one sentence: the key, the value it has, why it cannot be, and a value that would do.
"""

import math
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from tide_mega.config.errors import refuse
from tide_mega.config.injection import parse_injection
from tide_mega.config.schema import TideConfig
from tide_mega.config.shape_rules import check_memory_fit, check_model, check_parallel, check_world

CHOICES = {
    "memory.owners": ("tensor", "tensor_data"),
    "kernels.mix": ("auto", "naive", "cpu", "triton"),
    "kernels.row_norm": ("auto", "naive", "cpu", "triton"),
    "kernels.norm_router": ("auto", "naive", "triton"),
    "parallel.recompute": ("none", "selective", "full"),
    "trainer.precision": ("auto", "bf16", "fp32"),
    "data.on_bad_shard": ("fail", "skip"),
    "data.verify": ("size", "checksum"),
    "checkpoint.on_error": ("stop", "continue"),
    "faults.on_spike": ("log", "skip", "rollback"),
    "logging.wandb": ("auto", "online", "offline", "disabled"),
    "cluster.device": ("auto", "cpu", "cuda"),
}
POSITIVE = (
    *("model.num_layers", "model.hidden_size", "model.ffn_hidden_size", "model.num_attention_heads"),
    *("model.num_query_groups", "model.vocab_size", "model.rope_theta", "model.norm_eps"),
    *("parallel.tensor", "parallel.pipeline", "parallel.virtual_pipeline", "memory.width", "memory.window"),
    *("kernels.loss_tokens", "optim.lr", "optim.eps", "optim.decay_steps"),
    *("data.seq_length", "trainer.max_steps", "trainer.max_tokens", "trainer.global_batch_size"),
    *("trainer.micro_batch_size", "checkpoint.keep_last", "checkpoint.keep_every"),
    *("checkpoint.remote_keep_last", "logging.every", "cluster.peak_tflops"),
    *("cluster.memory_gb", "cluster.threads", "cluster.timeout_minutes"),
    *("faults.max_skipped_in_a_row", "faults.spike_z"),
)
NOT_NEGATIVE = (
    *("model.init_std", "memory.num_blocks", "memory.table_init_std", "memory.router_init_std"),
    *("optim.init_lr", "optim.min_lr", "optim.warmup_steps", "optim.weight_decay", "optim.clip_grad"),
    *("optim.table_lr_multiplier", "optim.table_weight_decay", "data.seed", "data.num_workers"),
    "data.perplexity_tokens",
    *("trainer.z_loss", "trainer.eval_every", "trainer.eval_sequences", "trainer.seed", "checkpoint.every"),
    *("faults.max_rollbacks", "faults.hang_minutes", "cluster.stop_before_minutes"),
)
UNSET = "???"


def total_steps(config: TideConfig) -> int:
    """Optimizer steps of the run: `max_steps`, or `max_tokens` rounded up to whole steps."""
    if config.trainer.max_steps is not None:
        return config.trainer.max_steps
    if config.trainer.max_tokens is None:
        refuse("trainer.max_steps", None, "leaves the run without an end", "give max_steps or max_tokens")
    return math.ceil(config.trainer.max_tokens / (config.trainer.global_batch_size * config.data.seq_length))


def validate(config: TideConfig, world_size: int | None = None) -> None:
    """Refuse a configuration that cannot run.

    Args:
        config: the whole configuration.
        world_size: processes of the run; None leaves out what depends on it (batch, windows, owners'
            shares, memory fit).

    Raises:
        ConfigError: one sentence that names the key, the value and what would do.
    """
    _check_values(config)
    check_model(config)
    check_parallel(config)
    _check_optim(config)
    _check_faults(config, world_size)
    _check_run(config)
    if world_size is not None:
        check_world(config, world_size)
        check_memory_fit(config, world_size)


def _look_up(config: TideConfig, key: str) -> Any:
    group, name = key.split(".")
    return getattr(getattr(config, group), name)


def _leaves(node: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for item in fields(node):
        value = getattr(node, item.name)
        if is_dataclass(value):
            yield from _leaves(value, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, value


def _check_values(config: TideConfig) -> None:
    for key, value in _leaves(config):
        if isinstance(value, str) and value == UNSET:
            refuse(key, value, "is not set", f"give {key}=<value> or choose a group that sets it")
        if isinstance(value, float) and not math.isfinite(value):
            refuse(key, value, "is not a finite number", "give a finite one")
    for key, choices in CHOICES.items():
        if (value := _look_up(config, key)) not in choices:
            refuse(key, value, "is not a known choice", f"use {', '.join(choices[:-1])} or {choices[-1]}")
    for key in POSITIVE:
        if (value := _look_up(config, key)) is not None and value <= 0:
            refuse(key, value, "is not positive", "give a number above 0")
    for key in NOT_NEGATIVE:
        if (value := _look_up(config, key)) is not None and value < 0:
            refuse(key, value, "is negative", "give 0 or more")


def _check_optim(config: TideConfig) -> None:
    optim, trainer = config.optim, config.trainer
    if trainer.max_steps is not None and trainer.max_tokens is not None:
        refuse(
            "trainer.max_steps",
            trainer.max_steps,
            f"and trainer.max_tokens={trainer.max_tokens} both end the run",
            "set one of them to null",
        )
    steps = total_steps(config)
    for key, value in (("init_lr", optim.init_lr), ("min_lr", optim.min_lr)):
        if value > optim.lr:
            refuse(f"optim.{key}", value, "is above the peak", f"use at most optim.lr={optim.lr}")
    for key, value in (("beta1", optim.beta1), ("beta2", optim.beta2)):
        if not 0 <= value < 1:
            refuse(f"optim.{key}", value, "is outside [0, 1)", "use a value such as 0.9 or 0.95")
    if optim.warmup_steps >= steps:
        refuse(
            "optim.warmup_steps",
            optim.warmup_steps,
            f"is not below the run's {steps} steps",
            f"use at most {steps - 1}, or train longer",
        )
    if optim.decay_steps is not None and optim.decay_steps <= optim.warmup_steps:
        refuse(
            "optim.decay_steps",
            optim.decay_steps,
            f"is not after optim.warmup_steps={optim.warmup_steps}",
            f"use null or at least {optim.warmup_steps + 1}",
        )


def _check_faults(config: TideConfig, world_size: int | None) -> None:
    faults, timeout = config.faults, config.cluster.timeout_minutes
    if faults.spike_window < 8:
        refuse("faults.spike_window", faults.spike_window, "is too short to judge by", "use 8 or more")
    if faults.straggler_ratio <= 1:
        refuse("faults.straggler_ratio", faults.straggler_ratio, "is not above 1", "use 1.5, say")
    if faults.hang_minutes is not None and faults.hang_minutes >= timeout:
        refuse(
            "faults.hang_minutes",
            faults.hang_minutes,
            f"is not below cluster.timeout_minutes={timeout}, when collectives give up and no stack is seen",
            "use null (two thirds of it) or a smaller number",
        )
    for text in faults.inject:
        rank = parse_injection(text).rank
        if world_size is not None and rank is not None and rank >= world_size:
            refuse("faults.inject", text, f"names a rank of {world_size} processes", "use 0 to one less")


def _check_run(config: TideConfig) -> None:
    name = config.run.name
    if name in ("", ".", "..") or Path(name).name != name or "\\" in name or "\0" in name:
        refuse("run.name", repr(name), "is not a folder's name", "use a name without path separators")
    for key, value in (("run.root", config.run.root), ("data.path", config.data.path)):
        if not value:
            refuse(key, repr(value), "is empty", "give a folder")
