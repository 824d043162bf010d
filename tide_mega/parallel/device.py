"""The device layer: which device, which collective backend, which optional GPU libraries.

The only lines of the package that differ between CPU and GPU are here and in `megatron_cpu`.
"""

import functools
import importlib
import importlib.util
import os
import resource
from dataclasses import dataclass

import torch

from tide_mega.config.errors import ConfigError

OPTIONAL_LIBRARIES = {
    "apex": ("apex.optimizers", "fused AdamW"),
    "flash-attn": ("flash_attn", "FlashAttention kernels"),
    "transformer-engine": ("transformer_engine", "not used yet"),
}
"""Distribution -> (module whose import proves it, what it is used for). PyPI's `apex` lacks the module."""


@dataclass(frozen=True)
class Device:
    """Where this process computes."""

    torch_device: torch.device
    backend: str
    """torch.distributed backend: nccl on CUDA, gloo on CPU."""
    name: str

    @property
    def is_cuda(self) -> bool:
        """Whether this is a GPU."""
        return self.torch_device.type == "cuda"

    def peak_memory_bytes(self) -> int:
        """Most memory this process has held: allocated on the GPU, or resident on CPU."""
        if self.is_cuda:
            return torch.cuda.max_memory_allocated(self.torch_device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def choose_device(wanted: str, local_rank: int) -> Device:
    """Resolve `cluster.device` (auto, cpu, cuda) and make the device current.

    Raises:
        ConfigError: cuda was asked for and there is none, or fewer GPUs than local ranks.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return Device(torch.device("cpu"), "gloo", "cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            f"cluster.device={wanted} needs a GPU for local rank {local_rank}, and this machine shows "
            f"{count}: start at most {count} processes a node, or set cluster.device=cpu."
        )
    torch.cuda.set_device(local_rank)
    return Device(torch.device("cuda", local_rank), "nccl", torch.cuda.get_device_name(local_rank))


def set_threads(threads: int | None, local_world_size: int) -> int:
    """Set the CPU threads of this process: `threads`, else its share of the cores. Return the number."""
    cores = len(os.sched_getaffinity(0))
    chosen = threads or max(1, cores // local_world_size)
    torch.set_num_threads(chosen)
    return chosen


@functools.cache
def detect_libraries() -> dict[str, str | None]:
    """Import every optional GPU library once; return its version, or None where it is not usable."""
    found: dict[str, str | None] = {}
    for distribution, (module, _) in OPTIONAL_LIBRARIES.items():
        found[distribution] = None
        if importlib.util.find_spec(module.split(".")[0]) is None:
            continue
        try:
            importlib.import_module(module)
        except Exception:  # a GPU build on a machine without its driver fails in many ways
            continue
        top = importlib.import_module(module.split(".")[0])
        found[distribution] = str(getattr(top, "__version__", "unknown"))
    return found
