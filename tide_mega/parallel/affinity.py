"""Binds a process to the cores of its GPU's NUMA node, so that its memory is allocated there too."""

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
        threads: requested number; None means this process's share of the node's cores, reduced by binding only if
            fewer cores are near.
        world: gives the number of processes on the node.
    """
    chosen = set_threads(threads, world.local_size)
    if bind_to_gpu(device, is_loud=world.local_rank == 0) and threads is None:
        chosen = set_threads(min(chosen, physical_cores()), 1)
    return chosen


def bind_to_gpu(device: Device, *, is_loud: bool, sysfs: Path = Path("/sys")) -> bool:
    """Bind all threads of this process to those of its cores that are nearest to its GPU.

    Threads and processes started later inherit the binding. If the machine does not tell which cores those are,
    or this process may use none of them, nothing changes. Memory needs no binding: Linux allocates it on the
    node of the thread that first touches it.

    Args:
        device: of this process; without a GPU nothing is done.
        is_loud: whether to log what was done, or why not.
        sysfs: mount point of sysfs.

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
    properties: Any = torch.cuda.get_device_properties(gpu)  # torch's type stub lacks the PCI address
    domain, bus, slot = properties.pci_domain_id, properties.pci_bus_id, properties.pci_device_id
    shown = sysfs / "bus" / "pci" / "devices" / f"{domain:04x}:{bus:02x}:{slot:02x}.0" / "local_cpulist"
    cores = _from_list(shown.read_text())
    if not cores:
        raise ValueError(f"{shown} names none")
    return cores


def _bind(cores: set[int]) -> None:
    os.sched_setaffinity(0, cores)
    for thread in os.listdir("/proc/self/task"):  # noqa: PTH208 names alone
        with contextlib.suppress(ProcessLookupError):  # the thread has ended
            os.sched_setaffinity(int(thread), cores)


def _from_list(text: str) -> set[int]:
    """Parse the kernel's list notation: 0-3,8."""
    ranges = [part.split("-") for part in text.strip().split(",") if part]
    return {number for ends in ranges for number in range(int(ends[0]), int(ends[-1]) + 1)}


def _as_list(numbers: set[int]) -> str:
    """Format in the kernel's list notation: 0-3,8."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)
