"""Binding a process to the cores near its GPU, with a pretended GPU and the kernel's real calls."""

import logging
import multiprocessing
import os
import threading
from types import SimpleNamespace

import pytest
import torch

from tide_mega.parallel.affinity import _as_list, _from_list, bind_to_gpu, take_cores
from tide_mega.parallel.device import Device
from tide_mega.parallel.groups import World

CPU = Device(torch.device("cpu"), "gloo", "cpu")
GPU = Device(torch.device("cuda", 5), "nccl", "NVIDIA H100 80GB HBM3")


@pytest.fixture
def pci(tmp_path, monkeypatch):
    """Pretend that GPU 5 is at PCI address 0001:9c:00.0; its folder under the kernel's devices."""

    def properties(device):
        assert device == GPU.torch_device
        return SimpleNamespace(pci_domain_id=1, pci_bus_id=0x9C, pci_device_id=0)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    folder = tmp_path / "bus" / "pci" / "devices" / "0001:9c:00.0"
    folder.mkdir(parents=True)
    return folder


def test_lists_of_cores_are_written_as_the_kernel_writes_them():
    for text, cores in (("0-3,8\n", {0, 1, 2, 3, 8}), ("5", {5}), ("\n", set()), ("0-1,4-5", {0, 1, 4, 5})):
        assert _from_list(text) == cores
        assert _as_list(cores) == text.strip()


def bind_in_a_child(sysfs, connection):
    started, release = threading.Event(), threading.Event()

    def stay():
        started.set()
        release.wait()

    other = threading.Thread(target=stay)
    other.start()
    started.wait()
    bound = bind_to_gpu(GPU, is_loud=True, sysfs=sysfs)
    connection.send((bound, os.sched_getaffinity(0), os.sched_getaffinity(other.native_id or 0)))
    release.set()
    other.join()


def test_all_threads_are_bound_to_those_near_cores_that_are_allowed(pci, tmp_path):
    core = max(os.sched_getaffinity(0))
    (pci / "local_cpulist").write_text(f"{core},100000-100003\n")
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=bind_in_a_child, args=(tmp_path, there))
    child.start()
    assert here.recv() == (True, {core}, {core})
    child.join()


@pytest.mark.parametrize(
    ("listed", "reason"),
    [
        ("100000-100003", "it may not use any of cores 100000-100003"),
        ("", "names none"),
        (None, "No such file"),
    ],
)
def test_where_no_near_core_is_known_or_allowed_it_stays_and_says_so(pci, tmp_path, caplog, listed, reason):
    if listed is not None:
        (pci / "local_cpulist").write_text(f"{listed}\n")
    before = os.sched_getaffinity(0)
    assert not bind_to_gpu(GPU, is_loud=True, sysfs=tmp_path)
    assert os.sched_getaffinity(0) == before
    assert "cuda:5: not bound to the cores near it, since" in caplog.text and reason in caplog.text
    caplog.clear()
    assert not bind_to_gpu(GPU, is_loud=False, sysfs=tmp_path)
    assert caplog.text == ""


def test_a_torch_that_does_not_tell_the_address_binds_nothing(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="H100"))
    assert not bind_to_gpu(GPU, is_loud=True)
    assert "pci_domain_id" in caplog.text


def test_without_a_gpu_nothing_is_bound(caplog):
    caplog.set_level(logging.INFO)
    assert not bind_to_gpu(CPU, is_loud=True) and caplog.text == ""


@pytest.mark.parametrize(
    ("near", "local_size", "wanted", "threads"),
    [(8, 8, None, 2), (8, 1, None, 8), (8, 1, 12, 12), (None, 1, None, 16)],
)
def test_threads_are_a_share_of_the_node_and_no_more_than_the_near_cores(
    monkeypatch, tmp_path, near, local_size, wanted, threads
):
    cores = [set(range(16))]

    def bind(device, is_loud):
        cores.append(set(range(near or 16)))
        return near is not None

    monkeypatch.setattr("os.sched_getaffinity", lambda _: cores[-1])
    monkeypatch.setattr("tide_mega.parallel.device._CPUS", tmp_path)  # names no threads of one core
    monkeypatch.setattr("tide_mega.parallel.affinity.bind_to_gpu", bind)
    before = torch.get_num_threads()
    try:
        assert take_cores(GPU, wanted, World(0, local_size, 0, local_size)) == threads
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
