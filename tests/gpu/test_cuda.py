"""The same program on a CUDA device: parity with the reference, optional libraries, a short training."""

import importlib.util

import pytest
import torch

from tests.support.runs import tiny, train_here
from tide_mega.metrics.jsonl import read_metrics
from tide_mega.parallel.device import choose_device
from tide_mega.parallel.groups import World, start_distributed, stop_distributed
from tide_mega.parity.case import Case
from tide_mega.parity.run import compare_gradients, compare_training, compare_updates

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(scope="module", autouse=True)
def world():
    torch.backends.cuda.matmul.allow_tf32 = False
    start_distributed(choose_device("cuda", 0), World(0, 1, 0, 1), timeout_minutes=5)
    yield
    stop_distributed()


@pytest.mark.parametrize("blocks", [0, 3, 8])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_fp32_gradients_equal_the_reference(blocks, recompute):
    deviation = compare_gradients(Case(num_blocks=blocks, recompute=recompute, device="cuda"))
    assert deviation.worst() < 1e-5, deviation


def test_fp32_training_equals_the_reference():
    deviation = compare_training(Case(num_blocks=3, device="cuda"))
    assert deviation.worst() < 1e-5, deviation


def test_bf16_training_errs_as_the_reference_in_bf16_does():
    deviation = compare_updates(Case(num_blocks=3, precision="bf16", accumulation=4, device="cuda"))
    assert max(deviation.tensors.values()) < 1.5, deviation


def test_a_bf16_run_resumes_with_the_same_losses(tiny_data, tmp_path):
    for name in ("whole", "again"):
        config = tiny(tiny_data, tmp_path / name, "trainer.precision=bf16", "cluster.device=cuda")
        assert train_here(config) == 6
    curves = [
        [r["loss"] for r in read_metrics(tmp_path / name / "tiny" / "metrics.jsonl") if "loss" in r]
        for name in ("whole", "again")
    ]
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed")
def test_flash_attention_equals_sdpa():
    from megatron.core.transformer.enums import AttnMaskType

    from tide_mega.model.attention import CausalCoreAttention

    core = CausalCoreAttention(None, 1, AttnMaskType.causal, "self", rope_theta=10_000.0)
    torch.manual_seed(0)
    query = torch.randn(64, 2, 8, 64, device="cuda", dtype=torch.bfloat16)
    key, value = torch.randn(2, 64, 2, 4, 64, device="cuda", dtype=torch.bfloat16)
    with_flash = core(query, key, value)
    core.flash = None
    torch.testing.assert_close(with_flash, core(query, key, value), rtol=2e-2, atol=2e-2)
