"""Chooses the version of each operation: by device and shape, unless the configuration sets it."""

import importlib.util
from dataclasses import dataclass

import torch

from tide_mega.config.schema import KernelConfig
from tide_mega.errors import refuse

MAX_TRITON_BLOCKS = 63
"""A token's router weights, including the null bank, must fit a tile of 64."""


@dataclass(frozen=True)
class KernelChoice:
    """The chosen versions: naive, cpu or triton."""

    mix: str
    """Also used for the row gradient."""
    row_norm: str
    norm_router: str
    """RMSNorm and router of the layers; naive on a CPU."""

    def describe(self) -> str:
        """Return a phrase for the start-up log."""
        return (
            f"mix and row gradient {self.mix}, row norm {self.row_norm}, norm and router {self.norm_router}"
        )


def choose_kernels(config: KernelConfig, device: torch.device, num_blocks: int) -> KernelChoice:
    """Resolve `auto` and check explicit choices.

    Raises:
        ConfigError: a version cannot run on this device or with this K.
    """
    return KernelChoice(
        _choose("kernels.mix", config.mix, device, num_blocks),
        _choose("kernels.row_norm", config.row_norm, device, num_blocks),
        _choose("kernels.norm_router", config.norm_router, device, num_blocks, on_cpu="naive"),
    )


def _choose(key: str, wanted: str, device: torch.device, num_blocks: int, on_cpu: str = "cpu") -> str:
    has_triton = importlib.util.find_spec("triton") is not None
    fits = num_blocks <= MAX_TRITON_BLOCKS
    if wanted == "auto":
        if device.type == "cpu":
            return on_cpu
        return "triton" if has_triton and fits else "naive"
    if wanted == "triton":
        if device.type != "cuda":
            refuse(key, wanted, f"does not run on {device.type}", "use auto or naive")
        if not has_triton:
            refuse(key, wanted, "needs the triton package", "install triton, or use auto or naive")
        if not fits:
            refuse(key, wanted, f"takes at most {MAX_TRITON_BLOCKS} memory blocks", "use auto or naive")
    if wanted == "cpu" and device.type != "cpu":
        refuse(key, wanted, f"does not run on {device.type}", "use auto, triton or naive")
    return wanted
