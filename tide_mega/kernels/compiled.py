"""torch.compile: the one door. Chains of elementwise operations become single passes over memory on a GPU."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def compiled(function: Callable[..., Any], device: torch.device, enabled: bool) -> Callable[..., Any]:
    """Return `function` compiled where that pays: on CUDA, and `enabled` (config key `kernels.compile`).

    The same function is compiled once in a process, however often it is asked for. A first size is compiled as
    it is, a second one makes the size dynamic.
    """
    return _compile(function) if enabled and device.type == "cuda" else function


@functools.cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=None)
