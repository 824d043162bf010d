"""Rules that a configuration must satisfy before anything is loaded; and the syntax of `faults.inject`.

They see the configuration alone. Against the data it is checked where that is opened: the vocabulary in
`tide_mega.training.setup.open_stream`, the sequence length in `tide_mega.data.loader.train_batches`, and that a
run goes on with its own data in `tide_mega.run.folder` and `tide_mega.checkpoint.state.Identity`.

`faults.inject` lists faults to inject on purpose, to test that a run survives them.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from tide_mega.config.schema import TideConfig
from tide_mega.config.shape_rules import check_memory_fit, check_model, check_parallel, check_world
from tide_mega.errors import refuse, refuse_credentials, refuse_huge
from tide_mega.files import check_folder_name, check_folder_path

KINDS = {
    "nan_loss": "the step's loss is NaN",
    "nan_grad": "a value of the step's reduced gradient is NaN",
    "spike": "the step's loss is ten times what it is",
    "slow": "the rank computes `seconds` (1 if not given) longer in this step and all later ones",
    "hang": "the rank never comes back; once in a run folder",
    "kill": "SIGKILL; once in a run folder",
    "bad_shard": "the run stops as on a shard that cannot be read",
    "disk_full": "the first checkpoint from this step on fails as on a full disk; once in a run folder",
}
"""Kinds of injected faults, with their effect."""

CHOICES = {
    "memory.owners": ("tensor", "tensor_data"),
    "optim.schedule": ("cosine", "wsd"),
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
UNSET = "???"


@dataclass(frozen=True)
class Injection:
    """One fault to inject."""

    text: str
    kind: str
    step: int
    """Number of the batch at which it strikes, from 1: the optimizer step, unless a rollback has skipped data."""
    rank: int | None
    """The rank that it strikes; None means all."""
    seconds: float


def parse_injection(text: str) -> Injection:
    """Read `kind@step[:rank[:seconds]]`, such as nan_grad@7:1 or slow@10:1:0.5.

    Raises:
        ConfigError: the kind is unknown, or step, rank or seconds is not a number in its range.
    """
    kind, _, rest = text.partition("@")
    if kind not in KINDS:
        refuse("faults.inject", text, "is no known fault", f"use kind@step[:rank] of {', '.join(KINDS)}")
    step, *more = rest.split(":")
    try:
        parsed = Injection(
            text, kind, int(step), int(more[0]) if more else None, float(more[1]) if len(more) > 1 else 1.0
        )
    except ValueError:
        parsed = None
    if (
        parsed is None
        or len(more) > (2 if kind == "slow" else 1)
        or parsed.step < 1
        or (parsed.rank or 0) < 0
        or not 0 < parsed.seconds < float("inf")
    ):
        form = "slow@step[:rank[:seconds]]" if kind == "slow" else f"{kind}@step[:rank]"
        refuse("faults.inject", text, "cannot be read", f"write {form} with a step from 1 and a rank from 0")
    return parsed


POSITIVE = (
    *("model.num_layers", "model.hidden_size", "model.ffn_hidden_size", "model.num_attention_heads"),
    *("model.num_query_groups", "model.vocab_size", "model.rope_theta", "model.norm_eps"),
    *("parallel.tensor", "parallel.pipeline", "parallel.virtual_pipeline", "memory.width", "memory.window"),
    *("kernels.loss_tokens", "optim.lr", "optim.eps", "optim.decay_steps"),
    *(
        "data.seq_length",
        "data.max_document_bytes",
        "trainer.max_steps",
        "trainer.max_tokens",
        "trainer.global_batch_size",
    ),
    *("trainer.micro_batch_size", "checkpoint.keep_last", "checkpoint.keep_every"),
    "checkpoint.export_hf_every",
    *("checkpoint.remote_keep_last", "logging.every", "cluster.peak_tflops"),
    *("cluster.memory_gb", "cluster.threads", "cluster.timeout_minutes"),
    *("faults.max_skipped_in_a_row", "faults.spike_z"),
)
NOT_NEGATIVE = (
    *("model.init_std", "memory.num_blocks", "memory.table_init_std", "memory.router_init_std"),
    *("optim.init_lr", "optim.min_lr", "optim.warmup_steps", "optim.weight_decay", "optim.clip_grad"),
    *("optim.cooldown_steps", "optim.rewarmup_steps"),
    *("optim.table_lr_multiplier", "optim.table_weight_decay", "data.seed", "data.num_workers"),
    "data.perplexity_tokens",
    *("trainer.z_loss", "trainer.eval_every", "trainer.eval_sequences", "trainer.seed", "checkpoint.every"),
    *("faults.max_rollbacks", "faults.hang_minutes", "cluster.stop_before_minutes"),
    *("cluster.min_node_gbs", "cluster.min_network_gbs"),
)


def total_steps(config: TideConfig) -> int:
    """Return the steps of a run with this batch size throughout: `max_steps`, or those that `max_tokens` give."""
    if config.trainer.max_steps is not None:
        return config.trainer.max_steps
    if config.trainer.max_tokens is None:
        refuse("trainer.max_steps", None, "leaves the run without an end", "give max_steps or max_tokens")
    return math.ceil(config.trainer.max_tokens / (config.trainer.global_batch_size * config.data.seq_length))


def parent_of(config: TideConfig) -> tuple[Path, int | None] | None:
    """Return the run folder and step (None: the newest) of `run.from`; None if it is null."""
    if config.run.from_ is None:
        return None
    match = re.fullmatch(r"(.+?)(?:@(\d+))?", config.run.from_, re.DOTALL)
    assert match is not None, "an empty run.from is refused"
    return Path(match[1]), None if match[2] is None else int(match[2])


def validate(config: TideConfig, world_size: int | None = None) -> None:
    """Refuse a configuration that cannot run.

    Args:
        config: the whole configuration.
        world_size: processes of the run; None skips the rules that depend on it (batch, windows, owners' shares,
            memory fit).

    Raises:
        ConfigError: one sentence that names the key, its value and a valid one.
    """
    _check_values(config)
    check_model(config)
    check_parallel(config)
    _check_optim(config)
    _check_faults(config, world_size)
    _check_run(config)
    _check_exports(config)
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
        refuse_huge(key, value)
        for text in value if isinstance(value, list) else [value]:
            refuse_credentials(key, str(text))
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
    total_steps(config)
    for key, value in (("init_lr", optim.init_lr), ("min_lr", optim.min_lr)):
        if value > optim.lr:
            refuse(f"optim.{key}", value, "is above the peak", f"use at most optim.lr={optim.lr}")
    for key, value in (("beta1", optim.beta1), ("beta2", optim.beta2)):
        if not 0 <= value < 1:
            refuse(f"optim.{key}", value, "is outside [0, 1)", "use a value such as 0.9 or 0.95")
    if optim.decay_steps is not None and optim.decay_steps <= optim.warmup_steps:
        refuse(
            "optim.decay_steps",
            optim.decay_steps,
            f"is not after optim.warmup_steps={optim.warmup_steps}",
            f"use null or at least {optim.warmup_steps + 1}",
        )
    if optim.schedule == "wsd" and optim.decay_steps is not None:
        why = "is for optim.schedule=cosine"
        refuse("optim.decay_steps", optim.decay_steps, why, "use null, and optim.cooldown_steps with wsd")
    if optim.schedule == "cosine" and optim.cooldown_steps:
        why = "is for optim.schedule=wsd"
        refuse("optim.cooldown_steps", optim.cooldown_steps, why, "use 0, or optim.schedule=wsd")
    if optim.rewarmup_steps and config.run.from_ is None:
        why = "is for a branch"
        refuse(
            "optim.rewarmup_steps", optim.rewarmup_steps, why, "use 0, or give run.from=<run folder>@<step>"
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
        _check_injection(config, parse_injection(text), world_size)


def _check_injection(config: TideConfig, fault: Injection, world_size: int | None) -> None:
    """Refuse a fault that could not strike in this run, or would have no effect."""
    steps, checkpoint = total_steps(config), config.checkpoint
    # A rollback skips data, so the run reads more batches than it has steps.
    if fault.step > steps and config.faults.on_spike != "rollback":
        why = f"strikes after the run's {steps} steps"
        refuse("faults.inject", fault.text, why, f"use a step from 1 to {steps}, or train longer")
    if fault.kind == "bad_shard" and config.data.on_bad_shard == "skip":
        why = "stops the run, and data.on_bad_shard=skip says to go on"
        refuse("faults.inject", fault.text, why, "use data.on_bad_shard=fail")
    last_saved = steps if checkpoint.at_end else steps - steps % checkpoint.every if checkpoint.every else 0
    if fault.kind == "disk_full" and fault.step > last_saved:
        why = (
            f"comes after the last checkpoint, at step {last_saved} with checkpoint.every={checkpoint.every}"
        )
        refuse("faults.inject", fault.text, why, "use an earlier step, or checkpoint.at_end=true")
    if fault.rank is None or world_size is None:
        return
    if fault.rank >= world_size:
        refuse("faults.inject", fault.text, f"names a rank of {world_size} processes", "use 0 to one less")
    first_of_last_stage = world_size - world_size // config.parallel.pipeline
    if fault.kind == "spike" and fault.rank < first_of_last_stage:
        why = f"names a rank without a loss: the last of parallel.pipeline={config.parallel.pipeline} has it"
        refuse("faults.inject", fault.text, why, f"use {first_of_last_stage} to {world_size - 1}")


def _check_run(config: TideConfig) -> None:
    check_folder_name("run.name", config.run.name)
    folders = {
        "run.root": config.run.root,
        "data.path": config.data.path,
        "checkpoint.remote": config.checkpoint.remote,
    }
    for key, value in folders.items():
        if value is not None:
            check_folder_path(key, value)
    if config.run.from_ is not None and not config.run.from_.strip():
        refuse("run.from", repr(config.run.from_), "is empty", "give <run folder>@<step>, or null")


def _check_exports(config: TideConfig) -> None:
    every, export_every = config.checkpoint.every, config.checkpoint.export_hf_every
    if export_every is None:
        return
    if not every:
        why = "needs checkpoints, and checkpoint.every=0 saves none on the way"
        refuse("checkpoint.export_hf_every", export_every, why, "use null, or set checkpoint.every")
    if export_every % every:
        why = f"falls between checkpoints, with checkpoint.every={every}"
        remedy = f"use a multiple of it, such as {every * (export_every // every + 1)}"
        refuse("checkpoint.export_hf_every", export_every, why, remedy)
