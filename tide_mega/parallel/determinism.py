"""Deterministic mode (`trainer.deterministic`): equal inputs give equal bits; restores all settings on exit."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from tide_mega.errors import ConfigError
from tide_mega.parallel.device import Device

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
NCCL_ALGORITHMS = "NCCL_ALGO"
_FIXED_WORKSPACES = (":4096:8", ":16:8")
"""With other workspaces cuBLAS may change its order of summation between products."""
_WITHOUT_SWITCHES = "^NVLS,NVLSTree"
"""NVLink switches add values in order of arrival; rings and trees add in the order of the ranks."""


@contextlib.contextmanager
def deterministic_algorithms(wanted: bool, device: Device) -> Iterator[None]:
    """Within this context, if `wanted`, every operation gives equal bits for equal inputs, or raises.

    Must be entered before the process multiplies on the GPU or joins NCCL, since both read the environment only
    once. Attention is then FlashAttention with its deterministic backward pass; torch has no deterministic one
    for cuDNN's.

    Raises:
        ConfigError: the environment asks cuBLAS or NCCL for something that is not deterministic.
    """
    if not wanted:
        yield
        return
    environment = _environment() if device.is_cuda else {}
    before = {name: os.environ.get(name) for name in environment}
    flags = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    os.environ.update(environment)
    torch.use_deterministic_algorithms(True)
    # Filling every torch.empty costs a pass over it, and only serves to find reads of uninitialised memory.
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(flags[0], warn_only=flags[1])
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _environment() -> dict[str, str]:
    workspace = os.environ.get(CUBLAS_WORKSPACE, _FIXED_WORKSPACES[0])
    if workspace not in _FIXED_WORKSPACES:
        raise ConfigError(
            f"trainer.deterministic=true needs {CUBLAS_WORKSPACE} to be {' or '.join(_FIXED_WORKSPACES)}, and it "
            f"is {workspace}: unset it."
        )
    algorithms = os.environ.get(NCCL_ALGORITHMS, _WITHOUT_SWITCHES)
    if "NVLS" in algorithms.upper() and not algorithms.startswith("^"):
        raise ConfigError(
            f"trainer.deterministic=true cannot go with {NCCL_ALGORITHMS}={algorithms}, which sums in NVLink's "
            "switches: unset it, or name Ring or Tree."
        )
    return {CUBLAS_WORKSPACE: workspace, NCCL_ALGORITHMS: algorithms}
