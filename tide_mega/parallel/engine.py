"""The engine, the only user of DeepSpeed: ZeRO sharding, gradient reduction, master weights, clipping, steps."""

import contextlib
import math
import os
import sys
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from tide_mega.config.schema import OptimConfig
from tide_mega.errors import ConfigError
from tide_mega.parallel.accumulation import GradientAccumulator
from tide_mega.parallel.device import Device
from tide_mega.parallel.engine_settings import EngineOptions, ParameterGroup, adamw, deepspeed_config
from tide_mega.parallel.gradient_ranges import GradientRange, gradient_ranges
from tide_mega.parallel.groups import Mpu, ParallelGroups
from tide_mega.parallel.optimizer_state import OptimizerState


def load_deepspeed(device: Device) -> Any:
    """Import DeepSpeed for the chosen device, whatever others this machine has; return the module.

    DeepSpeed binds its memory queries and operator builders to one kind of device on import, so a process keeps
    the kind on which its first engine was built.

    Raises:
        ConfigError: this process has already imported DeepSpeed for another kind of device.
    """
    kind = device.torch_device.type
    if "deepspeed" not in sys.modules:
        os.environ["DS_ACCELERATOR"] = kind
    import deepspeed

    loaded = deepspeed.accelerator.get_accelerator().device_name()
    if loaded != kind:
        raise ConfigError(
            f"The device {kind} was chosen, but this process has loaded DeepSpeed for {loaded}, which it cannot "
            f"change: run what needs {kind} in a process of its own."
        )
    # Compiling DeepSpeed's shared-memory collectives takes most of a minute, and gloo does not need them.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextlib.contextmanager
def _local_rank_of(device: Device) -> Iterator[None]:
    """Set LOCAL_RANK to the device's index, as DeepSpeed assumes; they differ if a process sees only one GPU."""
    index, before = device.torch_device.index, os.environ["LOCAL_RANK"]
    os.environ["LOCAL_RANK"] = before if index is None else str(index)
    try:
        yield
    finally:
        os.environ["LOCAL_RANK"] = before


class OutsideOptimizer(Protocol):
    """Weights outside DeepSpeed, updated beside it with the same clip factor."""

    def square_norm(self) -> torch.Tensor:
        """Return the sum of squares of this process's gradient, fp64."""

    def step(self, lr: float, scale: float) -> None:
        """Update with learning rate `lr` and the gradient times `scale`."""

    def drop_gradient(self) -> None:
        """Discard the gradient: the step is skipped on all ranks."""


class Engine:
    """A model and its optimizer under DeepSpeed ZeRO 1, 2 or 3.

    DeepSpeed's own gradient accumulation is 1: megatron's schedule divides by the number of micro-batches, and all
    backward passes of a step run inside `accumulate()`, which reduces once at its end.

    If there are weights outside DeepSpeed (on some ranks; `shares_norm` is set on all), the engine clips by
    itself: one norm over DeepSpeed's gradients and theirs, and one factor for both.
    """

    def __init__(
        self,
        model: nn.Module,
        parameter_groups: list[ParameterGroup],
        optim: OptimConfig,
        options: EngineOptions,
        groups: ParallelGroups,
        device: Device,
        outside: OutsideOptimizer | None = None,
    ) -> None:
        self.options, self.groups, self.outside = options, groups, outside
        self._norm: float | None = None
        self._outside_square: torch.Tensor | None = None
        self._device = device
        self.parameter_groups = [group for group in parameter_groups if group.parameters]
        self._deepspeed = load_deepspeed(device)
        self._deepspeed.init_distributed(dist_backend=device.backend, verbose=False, dist_init_required=False)
        with _local_rank_of(device):
            self._engine, *_ = self._deepspeed.initialize(
                model=model,
                optimizer=adamw(self.parameter_groups, optim, device),
                config=deepspeed_config(
                    options,
                    groups.data_size,
                    sum(p.numel() for group in self.parameter_groups for p in group.parameters),
                ),
                mpu=Mpu(groups),
                dist_init_required=False,
            )
        self._accumulator = GradientAccumulator(
            [p for group in self.parameter_groups if group.every_microbatch for p in group.parameters],
            groups,
            # ZeRO-3 leaves parameters empty between passes, and torch refuses a gradient of a different size.
            widen=options.precision == "bf16" and options.accumulation > 1 and options.zero_stage < 3,
        )

    @property
    def module(self) -> Any:
        """The model, cast and placed by DeepSpeed."""
        return self._engine.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward pass such that ZeRO sees backward passes through its output."""
        return self._engine(*args, **kwargs)

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Context for all backward passes of one optimizer step; gradients are reduced once, on exit."""
        with self._engine.coalesce_grad_reduction():
            yield
            self._accumulator.finish()

    def gradient_ranges(self, name: str) -> list[GradientRange]:
        """Return this rank's ranges of one parameter group's reduced gradient before clipping.

        Call after `accumulate` and before `step`.
        """
        parameters = [p for group in self.parameter_groups if group.name == name for p in group.parameters]
        stage, rank = self.options.zero_stage, self.groups.data_rank
        return list(gradient_ranges(self._engine.optimizer, parameters, stage, rank))

    def is_gradient_finite(self) -> torch.Tensor:
        """Return whether this process's share of the reduced gradient is finite, as 0-d bool on the device.

        Call after `accumulate` and before `step` or `skip`; does not synchronise. Every value counts, whether it
        is part of the norm or not.
        """
        gradients = self._reduced_gradients()
        largest = torch.nn.utils.get_total_norm(gradients, norm_type=math.inf)  # NaN wins, nothing overflows
        finite = torch.isfinite(largest.to(self._device.torch_device))
        if self.outside is not None:
            self._outside_square = self.outside.square_norm()
            finite = finite & torch.isfinite(self._outside_square)
        return finite

    def skip(self) -> None:
        """Drop the gradients without an update: weights, moments and Adam's count stay; call on every rank.

        Raises:
            RuntimeError: DeepSpeed updated anyway.
        """
        for gradient in self._reduced_gradients():
            gradient.fill_(math.nan)  # makes DeepSpeed skip the step by itself, with all its own cleanup
        self._norm = math.inf if self.options.shares_norm else None
        self._engine.step()
        if self._engine.was_step_applied():
            raise RuntimeError("DeepSpeed applied a gradient of NaN: this version does not skip it")
        self._drop_outside()

    def poison_gradient(self) -> None:
        """Set one value of this process's share of the reduced gradient to NaN, for fault injection."""
        next(g for g in self._reduced_gradients() if g.numel()).view(-1)[0] = math.nan

    def _reduced_gradients(self) -> list[torch.Tensor]:
        by_group = self._engine.optimizer.averaged_gradients
        return [gradient for group in by_group.values() for gradient in group or [] if gradient is not None]

    def _drop_outside(self) -> None:
        self._outside_square = None
        if self.outside is not None:
            self.outside.drop_gradient()

    def step(self, lr: float) -> bool:
        """Clip, update with learning rate `lr` times each group's multiplier, and clear gradients.

        DeepSpeed detects bad values only where its norm looks: with tensor and pipeline parallelism not in every
        copy of a replicated weight. So check `is_gradient_finite` on every rank first.

        The norm is clipped by DeepSpeed (`gradient_clipping` of `deepspeed_config`) or, where weights lie outside
        it, in `_clip_together`.

        Returns:
            Whether the update was made: a norm that is not finite leaves every rank's weights unchanged.
        """
        for group, settings in zip(self._engine.optimizer.param_groups, self.parameter_groups, strict=True):
            group["lr"] = lr * settings.lr_multiplier
        scale = self._clip_together() if self.options.shares_norm else 1.0
        self._engine.step()
        applied = self._engine.was_step_applied()
        if self.outside is not None:
            if applied:
                self.outside.step(lr, scale)
            else:
                self.outside.drop_gradient()
        self._outside_square = None
        return applied

    def _clip_together(self) -> float:
        """Scale DeepSpeed's reduced gradients by the clip factor of the common norm; return the factor.

        A norm that is not finite gives NaN, at which DeepSpeed skips the step on all ranks.
        """
        optimizer = self._engine.optimizer
        square = torch.zeros((), dtype=torch.float64, device=self._device.torch_device)
        if self.outside is not None:
            known = self._outside_square
            square += self.outside.square_norm() if known is None else known
        dist.all_reduce(square)
        inside = float(optimizer.scaled_global_norm())  # -1 if it is not finite
        self._norm = math.sqrt(inside**2 + float(square)) if inside >= 0 else math.inf
        scale = 1.0
        if not math.isfinite(self._norm):
            self._norm, scale = math.inf, math.nan
        elif self.options.clip_grad > 0:
            scale = min(1.0, self.options.clip_grad / (self._norm + 1e-6))
        for gradient in self._reduced_gradients():
            gradient.mul_(scale)
        return scale

    def grad_norm(self) -> float:
        """Return the global gradient norm of the last step before clipping, with every parameter counted once."""
        return float(self._engine.get_global_grad_norm()) if self._norm is None else self._norm

    def master_weight(self, parameter: nn.Parameter) -> torch.Tensor:
        """Return the full fp32 master weight, gathered over data parallelism; collective."""
        return self._deepspeed.utils.safe_get_full_fp32_param(parameter)

    @property
    def state(self) -> OptimizerState:
        """Return the master weights and moments that this data-parallel rank keeps, for checkpoints."""
        return OptimizerState(
            self._engine.optimizer, self.module, self.options.zero_stage, self.groups.data_rank
        )

    def close(self) -> None:
        """Remove hooks and free buffers, so that the process can build another engine."""
        self._accumulator.close()
        self._engine.destroy()
