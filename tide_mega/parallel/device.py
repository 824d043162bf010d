"""The device layer: which device, which collective backend, which optional GPU libraries.

The only lines of the package that differ between CPU and GPU are here and in `megatron_cpu`.
"""

import functools
import gc
import importlib
import importlib.util
import os
import resource
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from tide_mega.config.errors import ConfigError

OPTIONAL_LIBRARIES = {
    "apex": ("apex.optimizers", "fused AdamW"),
    "flash-attn": ("flash_attn", "FlashAttention kernels"),
    "transformer-engine": ("transformer_engine", "not used yet"),
}
"""Distribution -> (module whose import proves it, what it is used for). PyPI's `apex` lacks the module."""

_CPUS = Path("/sys/devices/system/cpu")


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

    def has_fast_bf16(self) -> bool:
        """Whether matrix products run faster in bf16 than in fp32: instructions for it, not emulation."""
        if self.is_cuda:
            return torch.cuda.is_bf16_supported(including_emulation=False)
        return bool(_cpu_flags() & {"amx_bf16", "avx512_bf16"})

    def memory_bytes(self) -> int:
        """Memory this process holds now: allocated on the GPU, or resident on CPU."""
        if self.is_cuda:
            return torch.cuda.memory_allocated(self.torch_device)
        return psutil.Process().memory_info().rss

    def free_memory(self) -> None:
        """Give back what nothing refers to any more, cycles included, before something large is built."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    def peak_memory_bytes(self) -> int:
        """Most memory this process has held: allocated on the GPU, or resident on CPU."""
        if self.is_cuda:
            return torch.cuda.max_memory_allocated(self.torch_device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _cpu_flags() -> set[str]:
    """Instruction sets of the processor, as Linux names them; none where it does not say."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


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
    """Set the CPU threads of this process: `threads`, else its share of the physical cores. Return the number."""
    chosen = threads or max(1, physical_cores() // local_world_size)
    torch.set_num_threads(chosen)
    return chosen


def physical_cores() -> int:
    """Cores this process may run on; threads of one core count once, since they share its arithmetic units."""
    siblings = [_CPUS / f"cpu{cpu}" / "topology/thread_siblings_list" for cpu in os.sched_getaffinity(0)]
    return len({path.read_text() if path.exists() else str(path) for path in siblings})


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
