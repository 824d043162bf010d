"""What a time was taken on."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tide_mega.parallel.device import Device

_CPU_INFO = Path("/proc/cpuinfo")


def machine_of(device: Device) -> str:
    """Name the device that computes, and for a CPU how many threads of how many cores."""
    if device.is_cuda:
        return f"one {device.name} (torch {torch.__version__})"
    number = torch.get_num_threads()
    threads = "1 thread" if number == 1 else f"{number} threads"
    return f"{_cpu()}, {threads} of {os.cpu_count()} cores (torch {torch.__version__})"


@contextmanager
def one_thread(device: Device) -> Iterator[None]:
    """Within it a CPU computes with one thread: a step at batch 1 waits for the slowest of several."""
    before = torch.get_num_threads()
    if not device.is_cuda:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cpu() -> str:
    lines = _CPU_INFO.read_text(errors="replace").splitlines() if _CPU_INFO.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
