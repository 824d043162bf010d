"""The shim is inert where CUDA exists, and exactly what it says where it does not."""

import torch

from tide_mega.parallel import megatron_cpu


def test_nothing_is_redirected_where_cuda_exists(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delattr(torch.cuda, "_tide_redirected", raising=False)
    before = {name: getattr(torch.cuda, name) for name in ("current_device", "synchronize", "manual_seed")}
    megatron_cpu.install()
    assert {name: getattr(torch.cuda, name) for name in before} == before
    with megatron_cpu.cuda_means_cpu():
        assert not torch.overrides._get_current_function_mode_stack()


def test_cuda_by_name_is_the_cpu_inside_the_schedule_only():
    with megatron_cpu.cuda_means_cpu():
        made = torch.zeros(2, device="cuda")
        assert made.device.type == "cpu"
        assert made.cuda() is made
    assert not torch.overrides._get_current_function_mode_stack()
