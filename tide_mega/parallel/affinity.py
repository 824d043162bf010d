"""Keeping a process on the cores of its GPU's NUMA node: its memory is then allocated there too."""

import contextlib
import logging
import os
from pathlib import Path
from typing import Any

import torch

from tide_mega.parallel.device import Device, physical_cores, set_threads
from tide_mega.parallel.groups import World

log = logging.getLogger(__name__)


def take_cores(device: Device, threads: int | None, world: World) -> int:
    """Bind this process to the cores near its GPU and set its CPU threads; return their number.

    Args:
        device: of this process.
        threads: wanted; None means its share of the node's cores, which binding does not make smaller unless fewer
            are near.
        world: tells how many processes share the node.
    """
    chosen = set_threads(threads, world.local_size)
    if bind_to_gpu(device, is_loud=world.local_rank == 0) and threads is None:
        chosen = set_threads(min(chosen, physical_cores()), 1)
    return chosen


def bind_to_gpu(device: Device, *, is_loud: bool, sysfs: Path = Path("/sys")) -> bool:
    """Keep all threads of this process on those of its cores that are nearest to its GPU.

    The threads and processes it starts later inherit it. Where the machine does not say which cores those are, or
    none of them is this process's to use, it stays as it was. Linux allocates memory where the thread that first
    touches it runs, so nothing is said about memory.

    Args:
        device: of this process; without a GPU there is nothing to do.
        is_loud: whether to log what was done, or why not.
        sysfs: where the kernel shows its devices.

    Returns:
        Whether the process is bound.
    """
    if not device.is_cuda:
        return False
    try:
        near = _cores_near(device.torch_device, sysfs)
        cores = near & os.sched_getaffinity(0)
        if not cores:
            raise ValueError(f"it may not use any of cores {_as_list(near)}")
        _bind(cores)
    except (OSError, AttributeError, ValueError) as error:
        if is_loud:
            log.warning("%s: not bound to the cores near it, since %s", device.torch_device, error)
        return False
    if is_loud:
        log.info("%s: bound to cores %s", device.torch_device, _as_list(cores))
    return True


def _cores_near(gpu: torch.device, sysfs: Path) -> set[int]:
    properties: Any = torch.cuda.get_device_properties(gpu)  # torch's stub leaves the address out
    domain, bus, slot = properties.pci_domain_id, properties.pci_bus_id, properties.pci_device_id
    shown = sysfs / "bus" / "pci" / "devices" / f"{domain:04x}:{bus:02x}:{slot:02x}.0" / "local_cpulist"
    cores = _from_list(shown.read_text())
    if not cores:
        raise ValueError(f"{shown} names none")
    return cores


def _bind(cores: set[int]) -> None:
    os.sched_setaffinity(0, cores)
    for thread in os.listdir("/proc/self/task"):  # noqa: PTH208 names alone
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(thread), cores)


def _from_list(text: str) -> set[int]:
    """The numbers of the kernel's notation: 0-3,8."""
    ranges = [part.split("-") for part in text.strip().split(",") if part]
    return {number for ends in ranges for number in range(int(ends[0]), int(ends[-1]) + 1)}


def _as_list(numbers: set[int]) -> str:
    """The kernel's notation of numbers: 0-3,8."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)
