"""Mistakes put into the product, in the process of one dry run: what people forget, where they forget it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.fake_cuda.training import Report, train
from tide_mega.config.schema import TideConfig
from tide_mega.kernels.mix import triton as triton_mix
from tide_mega.memory import memory as reading
from tide_mega.model import layer
from tide_mega.model import modules as attention


def rotation_on_the_cpu() -> None:
    """A tensor is made without its device."""
    made = attention.rotation
    attention.rotation = lambda *args: made(*args[:-1], torch.device("cpu"))


def look_at_a_number() -> None:
    """Each layer prints, logs or branches on a sum of its activations."""
    _before(layer, "mix", lambda args: args[2].sum().item())


def widen_to_float64() -> None:
    """A layer computes in float64."""
    _before(layer, "mix", lambda args: args[2].double().square())


def multiply_in_float32() -> None:
    """A product is made of widened matrices."""
    _before(layer, "mix", lambda args: args[2].float().flatten(0, 1).t() @ args[2].float().flatten(0, 1))


def send_host_memory() -> None:
    """A gradient is summed over NCCL from the CPU."""
    sum_over = reading.sum_over
    reading.sum_over = lambda group, tensor: sum_over(group, tensor.cpu())


def launch_on_a_transposed_tensor() -> None:
    """A kernel that walks rows is given columns."""
    launch = triton_mix.mix_forward
    triton_mix.mix_forward = lambda logits_NJ, *rest: launch(logits_NJ.t().contiguous().t(), *rest)


def train_with(plant: Callable[[], None], config: TideConfig, world: int, rank: int, root: Path) -> Report:
    """Train with a mistake in the product."""
    plant()
    return train(config, world, rank, root)


def _before(module: Any, name: str, act: Callable[[tuple[Any, ...]], object]) -> None:
    function = getattr(module, name)

    def wrapped(*args: Any) -> Any:
        act(args)
        return function(*args)

    setattr(module, name, wrapped)
