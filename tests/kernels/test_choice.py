"""Choosing versions."""

import pytest
import torch

from tide_mega.config.schema import KernelConfig
from tide_mega.errors import ConfigError
from tide_mega.kernels import choice
from tide_mega.kernels.choice import choose_kernels

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def with_triton(monkeypatch):
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: object())


def test_auto_takes_the_device_s_version(with_triton):
    assert choose_kernels(KernelConfig(), CPU, 8).mix == "cpu"
    assert choose_kernels(KernelConfig(), CUDA, 8).mix == "triton"
    assert choose_kernels(KernelConfig(), CUDA, 64).row_norm == "naive"
    chosen = [choose_kernels(KernelConfig(), *of).norm_router for of in ((CPU, 8), (CUDA, 8), (CUDA, 64))]
    assert chosen == ["naive", "triton", "naive"]


def test_auto_without_triton_on_a_gpu_is_naive(monkeypatch):
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None)
    assert choose_kernels(KernelConfig(), CUDA, 8).mix == "naive"
    with pytest.raises(ConfigError, match="triton package"):
        choose_kernels(KernelConfig(mix="triton"), CUDA, 8)


def test_the_configuration_wins(with_triton):
    chosen = choose_kernels(KernelConfig(mix="naive"), CPU, 8)
    assert (chosen.mix, chosen.row_norm) == ("naive", "cpu")
    assert "naive" in chosen.describe()
    assert choose_kernels(KernelConfig(norm_router="naive"), CUDA, 8).norm_router == "naive"
    with pytest.raises(ConfigError, match=r"kernels.norm_router=triton does not run on cpu"):
        choose_kernels(KernelConfig(norm_router="triton"), CPU, 8)


@pytest.mark.parametrize(
    ("wanted", "device", "blocks", "why"),
    [
        ("triton", CPU, 8, "does not run on cpu"),
        ("cpu", CUDA, 8, "does not run on cuda"),
        ("triton", CUDA, 64, "63"),
    ],
)
def test_what_cannot_run_is_refused(with_triton, wanted, device, blocks, why):
    with pytest.raises(ConfigError, match=why):
        choose_kernels(KernelConfig(row_norm=wanted), device, blocks)
