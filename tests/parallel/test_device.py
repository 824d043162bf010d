"""The device layer where there is no GPU, and the world as the environment tells it."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch

from tide_mega.errors import ConfigError
from tide_mega.parallel import device as device_module
from tide_mega.parallel.device import (
    Device,
    attention_name,
    choose_device,
    describe_libraries,
    detect_libraries,
    library_function,
    physical_cores,
    set_threads,
)
from tide_mega.parallel.engine_settings import optimizer_name
from tide_mega.parallel.groups import World, start_distributed


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def test_auto_means_cpu_and_gloo_without_a_gpu(no_gpu):
    device = choose_device("auto", 0)
    assert (device.torch_device.type, device.backend, device.is_cuda) == ("cpu", "gloo", False)
    assert device.peak_memory_bytes() > 2**20


def test_the_peak_is_not_below_what_is_held_where_the_kernel_is_late(no_gpu, monkeypatch):
    device, late = choose_device("cpu", 0), SimpleNamespace(ru_maxrss=1)
    monkeypatch.setattr(device_module.resource, "getrusage", lambda _: late)
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


@pytest.mark.parametrize("local_rank", [0, 1, 7])
def test_one_visible_gpu_is_the_process_s_own(monkeypatch, local_rank):
    chosen = pretend_gpus(monkeypatch, 1)
    assert choose_device("auto", local_rank) == Device(torch.device("cuda", 0), "nccl", "GPU 0")
    assert chosen == [0]


def test_several_visible_gpus_are_taken_by_local_rank(monkeypatch):
    chosen = pretend_gpus(monkeypatch, 2)
    assert choose_device("cuda", 1).torch_device == torch.device("cuda", 1)
    assert chosen == [1]
    with pytest.raises(
        ConfigError, match=r"a GPU for local rank 2, and this machine shows 2: start at most 2"
    ):
        choose_device("cuda", 2)


def pretend_gpus(monkeypatch, count):
    """Let torch say that there are GPUs; return the list of those made current."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    return chosen


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write libraries for this test alone: sources by path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    made = set()

    def forget():
        device_module._fault.cache_clear()
        device_module.flash_attention.cache_clear()
        for name in [name for name in sys.modules if name.split(".")[0] in made]:
            del sys.modules[name]

    def write(sources):
        for path, source in sources.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(source)
            made.add(path.split("/")[0].removesuffix(".py"))
        importlib.invalidate_caches()
        forget()

    yield write
    forget()


OPTIMIZERS = "class FusedAdam:\n    pass\n"
FLASH = (
    "__version__ = '2.8.3'\ndef flash_attn_func(q, k, v, causal, deterministic=False):\n    return 'flash'\n"
)


@pytest.mark.parametrize(
    ("sources", "version", "says"),
    [
        (
            {"apex/__init__.py": "__version__ = '0.9.10'"},
            None,
            "unusable: apex.optimizers cannot be imported",
        ),
        ({"apex/optimizers.py": ""}, None, "unusable: apex.optimizers has no FusedAdam"),
        ({"apex/optimizers.py": OPTIMIZERS}, None, "unusable: amp_C cannot be imported"),
        (
            {"apex/optimizers.py": OPTIMIZERS, "amp_C.py": "raise OSError('libcudart.so')"},
            None,
            "unusable: amp_C cannot be imported",
        ),
        (
            {"apex/__init__.py": "__version__ = '25.9'", "apex/optimizers.py": OPTIMIZERS, "amp_C.py": ""},
            "25.9",
            "apex 25.9 (fused AdamW)",
        ),
    ],
)
def test_apex_is_used_where_its_cuda_extension_is_there(package, sources, version, says):
    package(sources)
    assert detect_libraries()["apex"] == version
    assert says in describe_libraries()
    assert (library_function("apex") is None) == (version is None)
    name = optimizer_name(Device(torch.device("cuda", 0), "nccl", "a GPU"))
    assert name == ("torch AdamW (fused)" if version is None else "apex FusedAdam")


def test_flash_attn_4_alone_is_not_taken_for_flash_attn_2(package, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    package({"flash_attn/cute/__init__.py": "def flash_attn_func(q, k, v): ..."})
    assert detect_libraries()["flash-attn"] is None
    assert "flash-attn unusable: flash_attn has no flash_attn_func" in describe_libraries()
    assert device_module.flash_attention(torch.device("cuda", 0)) is None


@pytest.mark.parametrize(
    ("capability", "used"),
    [((8, 0), True), ((8, 9), True), ((9, 0), False), ((10, 3), False), ((12, 0), False)],
)
def test_flash_attn_is_for_gpus_before_hopper(package, monkeypatch, capability, used):
    package({"flash_attn/__init__.py": FLASH})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    gpu = Device(torch.device("cuda", 0), "nccl", "a GPU")
    assert (device_module.flash_attention(gpu.torch_device) is not None) == used
    assert attention_name(gpu) == ("flash-attn" if used else "torch SDPA")
    assert detect_libraries()["flash-attn"] == "2.8.3"
    assert device_module.flash_attention(torch.device("cpu")) is None


def test_world_from_the_environment(monkeypatch):
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert World.from_environment() == World(5, 8, 1, 4)


def test_several_processes_without_a_rendezvous_are_refused(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=2 but MASTER_ADDR and MASTER_PORT.*torchrun"):
        start_distributed(choose_device("cpu", 0), World(0, 2, 0, 2), timeout_minutes=1)
