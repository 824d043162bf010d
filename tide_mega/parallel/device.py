"""The device layer: which device, which collective backend, which optional GPU libraries.

The only code of the package that differs between CPU and GPU is here and in `megatron_cpu`.
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

from tide_mega.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Precisions by the names that configurations and options have for them."""


@dataclass(frozen=True)
class OptionalLibrary:
    """A library that is used if available; otherwise torch's own implementation takes its place."""

    module: str
    function: str
    """What the module must contain, since unrelated packages of the same name exist."""
    use: str
    extension: str | None = None
    """The compiled module without which the function raises at its first use."""


OPTIONAL_LIBRARIES = {
    # PyPI's `apex` has no optimizers, and NVIDIA's apex built without CUDA extensions lacks amp_C.
    "apex": OptionalLibrary("apex.optimizers", "FusedAdam", "fused AdamW", extension="amp_C"),
    # flash-attn-4 by itself installs only flash_attn.cute, and nothing at the top level.
    "flash-attn": OptionalLibrary("flash_attn", "flash_attn_func", "attention below compute capability 9"),
}
"""Optional libraries by distribution name."""

_CPUS = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class Device:
    """The device on which this process computes."""

    torch_device: torch.device
    backend: str
    """torch.distributed backend: nccl on CUDA, gloo on CPU."""
    name: str

    @property
    def is_cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.torch_device.type == "cuda"

    def has_fast_bf16(self) -> bool:
        """Return whether matrix products are faster in bf16 than in fp32: by instructions, not emulation."""
        if self.is_cuda:
            return torch.cuda.is_bf16_supported(including_emulation=False)
        return bool(_cpu_flags() & {"amx_bf16", "avx512_bf16"})

    def memory_bytes(self) -> int:
        """Return the memory that this process holds now: allocated on the GPU, or resident on CPU."""
        if self.is_cuda:
            return torch.cuda.memory_allocated(self.torch_device)
        return psutil.Process().memory_info().rss

    def free_memory(self) -> None:
        """Free unreferenced memory, including reference cycles, before something large is built."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    def peak_memory_bytes(self) -> int:
        """Return the peak memory of this process: allocated on the GPU, or resident on CPU."""
        if self.is_cuda:
            return torch.cuda.max_memory_allocated(self.torch_device)
        # The kernel updates the peak later than the resident size.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return max(peak, self.memory_bytes())


def _cpu_flags() -> set[str]:
    """Return the processor's instruction sets as named by Linux; empty if not available."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def choose_device(wanted: str, local_rank: int) -> Device:
    """Resolve `cluster.device` (auto, cpu, cuda) and make the device current.

    If a single GPU is visible, it is this process's own, whatever its local rank: `srun --gpus-per-task=1` and
    `--gpu-bind` show each task only its own GPU. If several processes share it after all, NCCL reports their
    ranks.

    Raises:
        ConfigError: cuda was requested and there is no GPU, or there are several but fewer than local ranks.
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
    """Set this process's CPU threads to `threads` or its share of the physical cores; return the number."""
    chosen = threads or max(1, physical_cores() // local_world_size)
    torch.set_num_threads(chosen)
    return chosen


def physical_cores() -> int:
    """Return the number of cores this process may use; hyperthreads count once, as they share arithmetic units."""
    siblings = [_CPUS / f"cpu{cpu}" / "topology/thread_siblings_list" for cpu in os.sched_getaffinity(0)]
    return len({path.read_text() if path.exists() else str(path) for path in siblings})


def detect_libraries() -> dict[str, str | None]:
    """Return the version of every optional library; None if it cannot be used."""
    return {name: None if _fault(name) else _version(name) for name in OPTIONAL_LIBRARIES}


def describe_libraries() -> str:
    """Return a line for the start-up log: each optional library, its version or what it lacks, and its use."""
    return "; ".join(
        f"{name} {_fault(name) or _version(name)} ({library.use})"
        for name, library in OPTIONAL_LIBRARIES.items()
    )


def library_function(name: str) -> Callable[..., Any] | None:
    """Return the function that an optional library is used for; None if it cannot be used."""
    library = OPTIONAL_LIBRARIES[name]
    return None if _fault(name) else getattr(importlib.import_module(library.module), library.function)


@functools.cache
def _fault(name: str) -> str | None:
    """Import a library once; return why it cannot be used, or None if it can."""
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
    """Return flash-attn's kernel if it is the fastest for 16 bits; None if torch's own attention is.

    From compute capability 9 on torch is preferred: on 9 and 10 its SDPA tries cuDNN before its own copy of
    FlashAttention 2 (torch 2.13, cuDNN above 9.15.0), whose kernels do not use the new instructions of these GPUs.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9:
        return None
    return library_function("flash-attn")


def attention_name(device: Device) -> str:
    """Return the name of the attention that 16-bit training will use, for the start-up log."""
    return "flash-attn" if flash_attention(device.torch_device) else "torch SDPA"
