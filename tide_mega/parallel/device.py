"""The device layer: which device, which collective backend, which optional GPU libraries.

The only lines of the package that differ between CPU and GPU are here and in `megatron_cpu`.
"""

import functools
import gc
import importlib
import importlib.util
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from tide_mega.config.errors import ConfigError


@dataclass(frozen=True)
class OptionalLibrary:
    """A library that is used where it can be; what takes its place is torch's own."""

    module: str
    function: str
    """What the module must have: packages of the same name do without it."""
    use: str
    extension: str | None = None
    """The compiled module without which the function raises at its first use."""


OPTIONAL_LIBRARIES = {
    # PyPI's `apex` has no optimizers, and NVIDIA's built without CUDA extensions no amp_C.
    "apex": OptionalLibrary("apex.optimizers", "FusedAdam", "fused AdamW", extension="amp_C"),
    # flash-attn-4 alone installs flash_attn.cute, and nothing at the top.
    "flash-attn": OptionalLibrary("flash_attn", "flash_attn_func", "attention below compute capability 9"),
}
"""By distribution."""

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
        # The kernel brings its peak up to date later than what is resident.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return max(peak, self.memory_bytes())


def _cpu_flags() -> set[str]:
    """Instruction sets of the processor, as Linux names them; none where it does not say."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def choose_device(wanted: str, local_rank: int) -> Device:
    """Resolve `cluster.device` (auto, cpu, cuda) and make the device current.

    Where one GPU is visible it is this process's own, whatever its local rank: `srun --gpus-per-task=1` and
    `--gpu-bind` show each task its GPU alone. NCCL names the ranks where several processes share one after all.

    Raises:
        ConfigError: cuda was asked for and there is none, or several and fewer than local ranks.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return Device(torch.device("cpu"), "gloo", "cpu")
    count = torch.cuda.device_count()
    index = 0 if count == 1 else local_rank
    if index >= count:
        raise ConfigError(
            f"cluster.device={wanted} needs a GPU for local rank {local_rank}, and this machine shows "
            f"{count}: start at most {count} processes a node, or set cluster.device=cpu."
        )
    torch.cuda.set_device(index)
    return Device(torch.device("cuda", index), "nccl", torch.cuda.get_device_name(index))


def set_threads(threads: int | None, local_world_size: int) -> int:
    """Set the CPU threads of this process: `threads`, else its share of the physical cores. Return the number."""
    chosen = threads or max(1, physical_cores() // local_world_size)
    torch.set_num_threads(chosen)
    return chosen


def physical_cores() -> int:
    """Cores this process may run on; threads of one core count once, since they share its arithmetic units."""
    siblings = [_CPUS / f"cpu{cpu}" / "topology/thread_siblings_list" for cpu in os.sched_getaffinity(0)]
    return len({path.read_text() if path.exists() else str(path) for path in siblings})


def detect_libraries() -> dict[str, str | None]:
    """Return the version of every optional library, or None where it cannot be used."""
    return {name: None if _fault(name) else _version(name) for name in OPTIONAL_LIBRARIES}


def describe_libraries() -> str:
    """One line for the start-up log: each optional library, its version or what it lacks, and its use."""
    return "; ".join(
        f"{name} {_fault(name) or _version(name)} ({library.use})"
        for name, library in OPTIONAL_LIBRARIES.items()
    )


def library_function(name: str) -> Callable[..., Any] | None:
    """Return what an optional library is for, or None where it cannot be used."""
    library = OPTIONAL_LIBRARIES[name]
    return None if _fault(name) else getattr(importlib.import_module(library.module), library.function)


@functools.cache
def _fault(name: str) -> str | None:
    """Import a library once; return why it cannot be used, or None where it can."""
    library = OPTIONAL_LIBRARIES[name]
    if importlib.util.find_spec(library.module.split(".")[0]) is None:
        return "absent"
    for module in (library.module, library.extension):
        try:
            found = importlib.import_module(module) if module else None
        except Exception:  # a GPU build on a machine without its driver fails in many ways
            return f"unusable: {module} cannot be imported"
        if module == library.module and not hasattr(found, library.function):
            return f"unusable: {module} has no {library.function}"
    return None


def _version(name: str) -> str:
    top = importlib.import_module(OPTIONAL_LIBRARIES[name].module.split(".")[0])
    return str(getattr(top, "__version__", "unknown"))


@functools.cache
def flash_attention(device: torch.device) -> Callable[..., torch.Tensor] | None:
    """Return flash-attn's kernel where it is the fastest for 16 bits; None where torch's own attention is.

    From capability 9 on torch goes first: on 9 and 10 its SDPA tries cuDNN before its own copy of FlashAttention 2
    (torch 2.13, cuDNN above 9.15.0), whose kernels do not know those GPUs' new instructions.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9:
        return None
    return library_function("flash-attn")


def attention_name(device: Device) -> str:
    """Return the attention that 16-bit training will use, for the start-up log."""
    return "flash-attn" if flash_attention(device.torch_device) else "torch SDPA"
