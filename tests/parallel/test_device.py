"""The device layer where there is no GPU, and the world as the environment tells it."""

import pytest
import torch

from tide_mega.config.errors import ConfigError
from tide_mega.parallel import device as device_module
from tide_mega.parallel.device import choose_device, detect_libraries, physical_cores, set_threads
from tide_mega.parallel.groups import World, start_distributed


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def test_auto_means_cpu_and_gloo_without_a_gpu(no_gpu):
    device = choose_device("auto", 0)
    assert (device.torch_device.type, device.backend, device.is_cuda) == ("cpu", "gloo", False)
    assert device.peak_memory_bytes() > 2**20


def test_cuda_without_a_gpu_is_refused_by_name(no_gpu):
    with pytest.raises(ConfigError, match=r"cluster\.device=cuda needs a GPU.*cluster\.device=cpu"):
        choose_device("cuda", 0)


def test_threads_of_one_core_count_once(tmp_path, monkeypatch):
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    monkeypatch.setattr(device_module, "_CPUS", tmp_path)
    for allowed, cores in (({0, 1, 2, 3}, 2), ({0, 2}, 1), ({1, 2}, 2), ({7, 8, 9}, 3)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, allowed=allowed: allowed)
        assert physical_cores() == cores


def test_fast_bf16_is_read_from_the_processor_s_flags(monkeypatch, no_gpu):
    for flags, fast in (({"avx512f"}, False), ({"avx512_bf16"}, True), ({"amx_bf16", "amx_tile"}, True)):
        monkeypatch.setattr(device_module, "_cpu_flags", lambda flags=flags: flags)
        assert choose_device("cpu", 0).has_fast_bf16() is fast


def test_the_cores_are_shared_by_the_processes_of_a_node(tmp_path, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(device_module, "_CPUS", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)))
    try:
        assert set_threads(None, 4) == torch.get_num_threads() == 3
        assert set_threads(None, 100) == 1
        assert set_threads(2, 4) == 2
    finally:
        torch.set_num_threads(before)


def test_pypi_apex_without_its_optimizers_is_not_taken_for_nvidias(tmp_path, monkeypatch):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("__version__ = '0.9.10'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    detect_libraries.cache_clear()
    try:
        assert detect_libraries()["apex"] is None
    finally:
        detect_libraries.cache_clear()


def test_world_from_the_environment(monkeypatch):
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert World.from_environment() == World(5, 8, 1, 4)


def test_several_processes_without_a_rendezvous_are_refused(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=2 but MASTER_ADDR and MASTER_PORT.*torchrun"):
        start_distributed(choose_device("cpu", 0), World(0, 2, 0, 2), timeout_minutes=1)
