"""When a function is compiled, and when it is left alone."""

import pytest
import torch

from tide_mega.kernels.compiled import compiled


def double(x):
    return 2 * x


@pytest.mark.parametrize(("device", "enabled"), [("cpu", True), ("cpu", False), ("cuda", False)])
def test_a_function_is_left_alone_off_the_gpu_or_when_switched_off(device, enabled):
    assert compiled(double, torch.device(device), enabled) is double


def test_on_a_gpu_it_is_compiled_once():
    cuda = torch.device("cuda")
    assert compiled(double, cuda, True) is not double
    assert compiled(double, cuda, True) is compiled(double, cuda, True)
