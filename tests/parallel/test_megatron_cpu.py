"""Megatron's calls by name go to the CPU while the CPU is the device chosen, and to CUDA otherwise."""

import pytest
import torch
from megatron.core.tensor_parallel import random as megatron_random

from tide_mega.parallel import megatron_cpu
from tide_mega.parallel.device import Device, choose_device
from tide_mega.parallel.groups import World, start_distributed, stop_distributed

CPU = torch.device("cpu")
NAMES = {
    torch.cuda: ("current_device", "synchronize", "get_rng_state", "manual_seed"),
    megatron_random: ("_get_cuda_rng_state", "_set_cuda_rng_state"),
}


def by_name():
    return [getattr(owner, name) for owner, names in NAMES.items() for name in names]


@pytest.fixture
def start():
    """Start a group of one on a device, which need not be there; one that an entry point left ends first."""
    stop_distributed()
    yield lambda device: start_distributed(device, World(0, 1, 0, 1), timeout_minutes=1)
    stop_distributed()


def test_the_device_chosen_decides_and_not_what_the_machine_has(monkeypatch, start):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    originals = by_name()
    start(choose_device("cpu", 0))
    assert torch.cuda.current_device() == CPU
    assert not set(by_name()) & set(originals)
    with megatron_cpu.cuda_means_cpu():
        assert torch.zeros(2, device="cuda").device == CPU
    stop_distributed()
    assert by_name() == originals


def test_nothing_is_redirected_where_a_gpu_was_chosen(start):
    originals = by_name()
    start(Device(torch.device("cuda", 0), "gloo", "a GPU"))
    assert by_name() == originals
    with megatron_cpu.cuda_means_cpu():
        assert not torch.overrides._get_current_function_mode_stack()


def test_a_gpu_after_the_cpu_in_the_same_process_gets_its_calls_back(start):
    originals = by_name()
    start(choose_device("cpu", 0))
    start(choose_device("cpu", 0))  # once more changes nothing
    start(Device(torch.device("cuda", 0), "gloo", "a GPU"))
    assert by_name() == originals


def test_cuda_by_name_is_the_cpu_inside_the_schedule_only(start):
    start(choose_device("cpu", 0))
    with megatron_cpu.cuda_means_cpu():
        made = torch.zeros(2, device="cuda")
        assert made.device == CPU
        assert made.cuda() is made
    assert not torch.overrides._get_current_function_mode_stack()
