"""Settings of the engine: parameter groups and options, and DeepSpeed's configuration and optimizer from them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tide_mega.config.device_memory import LIVE_PARAMETERS, REDUCE_BUCKET
from tide_mega.config.schema import OptimConfig
from tide_mega.parallel.device import Device, library_function


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate and a weight decay."""

    name: str
    parameters: list[nn.Parameter]
    weight_decay: float
    lr_multiplier: float = 1.0
    every_microbatch: bool = True
    """Whether each micro-batch adds to the gradient; tables receive theirs once a step."""


@dataclass(frozen=True)
class EngineOptions:
    """What the engine needs of the configuration."""

    zero_stage: int
    precision: str
    clip_grad: float
    micro_batch_size: int
    accumulation: int
    """Micro-batches of one data-parallel rank in an optimizer step."""
    shares_norm: bool = False
    """Whether some ranks hold weights outside DeepSpeed; equal on all ranks."""


def optimizer_name(device: Device) -> str:
    """Return the name of the AdamW implementation that will be used, for the start-up log."""
    if device.is_cuda and library_function("apex"):
        return "apex FusedAdam"
    return "torch AdamW (fused)"


def adamw(groups: list[ParameterGroup], optim: OptimConfig, device: Device) -> torch.optim.Optimizer:
    """Return the optimizer that DeepSpeed steps, the one that `optimizer_name` names."""
    settings = [
        {"params": group.parameters, "weight_decay": group.weight_decay, "name": group.name}
        for group in groups
    ]
    common: dict[str, Any] = {"lr": optim.lr, "betas": (optim.beta1, optim.beta2), "eps": optim.eps}
    if device.is_cuda and (fused_adam := library_function("apex")):
        return fused_adam(settings, adam_w_mode=True, **common)
    return torch.optim.AdamW(settings, fused=True, **common)


def deepspeed_config(options: EngineOptions, data_size: int, elements: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration for `data_size` replicas and `elements` weights on this device."""
    return {
        "train_micro_batch_size_per_gpu": options.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "train_batch_size": options.micro_batch_size * data_size,
        "gradient_clipping": 0.0 if options.shares_norm else options.clip_grad,
        # Without the check DeepSpeed clips by a norm of -1 if the gradient is not finite.
        "bf16": {"enabled": options.precision == "bf16", "check_grad_overflow": True},
        # With fp32 here DeepSpeed 0.19 switches bf16 at stage 1 to another optimizer, without `accumulate`'s one
        # reduction per step; GradientAccumulator keeps the micro-batches' sum in fp32 instead.
        "data_types": {"grad_accum_dtype": options.precision},
        "zero_optimization": {
            "stage": options.zero_stage,
            "overlap_comm": False,
            # DeepSpeed allocates the whole bucket, of which no more than all weights is ever used. With this size
            # the buckets, and so the sums, are the same as with its default of 5e8.
            "reduce_bucket_size": max(1, min(REDUCE_BUCKET, elements)),
            "stage3_max_live_parameters": LIVE_PARAMETERS,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        # On by default and synchronising: the host would wait for the GPU in every forward pass.
        "timers": {"throughput": {"enabled": False}},
    }
