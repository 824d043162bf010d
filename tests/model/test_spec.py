"""What megatron-core is told to fuse, and that its fused SwiGLU is the plain one."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

from tide_mega.config.hydra_door import compose
from tide_mega.lab.parity.case import Case, configuration
from tide_mega.model.spec import transformer_config


@pytest.mark.parametrize(
    ("device", "compile_kernels", "fused"),
    [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)],
)
def test_swiglu_is_fused_on_a_gpu_only(device, compile_kernels, fused):
    config = configuration(Case())
    built = transformer_config(config.model, config.parallel, "bf16", torch.device(device), compile_kernels)
    assert built.bias_activation_fusion is fused
    assert not built.add_bias_linear


@pytest.mark.parametrize("parallel", ["pp2", "pp2_interleaved"])
def test_no_exchange_between_stages_waits_for_the_whole_device(parallel):
    config = compose([f"parallel={parallel}"])
    built = transformer_config(config.model, config.parallel, "bf16", torch.device("cpu"))
    assert not built.batch_p2p_sync


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_fused_swiglu_equals_the_plain_one():
    both = torch.randn(5, 2, 12, requires_grad=True)
    gate, up = both.chunk(2, dim=-1)
    expected, actual = F.silu(gate) * up, bias_swiglu_impl(both, None)
    torch.testing.assert_close(actual, expected)
    seed = torch.randn_like(expected)
    (gradient,), (right,) = (torch.autograd.grad(x, both, seed) for x in (actual, expected))
    torch.testing.assert_close(gradient, right)
