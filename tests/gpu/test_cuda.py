"""The same program on a CUDA device: parity with the reference, optional libraries, a short training."""

import pytest
import torch

from tests.support.runs import curve, tiny, train_here
from tide_mega.lab.parity.case import Case
from tide_mega.lab.parity.pool import WorkerPool
from tide_mega.lab.parity.run import compare_gradients, compare_training, compare_updates
from tide_mega.metrics.jsonl import read_metrics
from tide_mega.parallel.determinism import deterministic_algorithms
from tide_mega.parallel.device import choose_device, library_function

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(scope="module")
def on_gpu():
    """Call a function in a process of its own: pytest's builds engines on the CPU, and a process has one kind."""
    with WorkerPool(1, device="cuda", timeout=600) as pool:
        pool.run(forbid_tf32)
        yield lambda function, *args: pool.run(function, *args)[0]


def forbid_tf32():
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("blocks", [0, 3, 8])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_fp32_gradients_equal_the_reference(on_gpu, blocks, recompute):
    deviation = on_gpu(compare_gradients, Case(num_blocks=blocks, recompute=recompute, device="cuda"))
    assert deviation.worst() < 1e-5, deviation


def test_fp32_training_equals_the_reference(on_gpu):
    deviation = on_gpu(compare_training, Case(num_blocks=3, device="cuda"))
    assert deviation.worst() < 1e-5, deviation


def test_bf16_training_errs_as_the_reference_in_bf16_does(on_gpu):
    deviation = on_gpu(compare_updates, Case(num_blocks=3, precision="bf16", accumulation=4, device="cuda"))
    assert max(deviation.tensors.values()) < 1.5, deviation


def test_a_bf16_run_resumes_with_the_same_losses(on_gpu, tiny_data, tmp_path):
    for name in ("whole", "again"):
        config = tiny(tiny_data, tmp_path / name, "trainer.precision=bf16", "cluster.device=cuda")
        assert on_gpu(train_here, config) == 6
    curves = [
        [r["loss"] for r in read_metrics(tmp_path / name / "tiny" / "metrics.jsonl") if "loss" in r]
        for name in ("whole", "again")
    ]
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)


def train_deterministically(config):
    with deterministic_algorithms(True, choose_device("cuda", 0)):
        return train_here(config)


def test_a_deterministic_bf16_run_repeats_to_the_last_bit(tiny_data, tmp_path):
    curves = []
    for name in ("whole", "again"):
        words = ("trainer.precision=bf16", "cluster.device=cuda", "trainer.deterministic=true")
        with WorkerPool(1, device="cuda", timeout=600) as fresh:  # cuBLAS reads its environment once
            assert fresh.run(train_deterministically, tiny(tiny_data, tmp_path / name, *words)) == [6]
        curves.append(curve(tmp_path / name / "tiny" / "metrics.jsonl"))
    assert curves[0] == curves[1]


@pytest.mark.skipif(library_function("flash-attn") is None, reason="flash-attn is not installed")
def test_flash_attention_equals_sdpa(monkeypatch):
    from megatron.core.transformer.enums import AttnMaskType

    from tide_mega.model import modules as attention

    core = attention.CausalCoreAttention(None, 1, AttnMaskType.causal, "self", rope_theta=10_000.0)
    torch.manual_seed(0)
    query = torch.randn(64, 2, 8, 64, device="cuda", dtype=torch.bfloat16)
    key, value = torch.randn(2, 64, 2, 4, 64, device="cuda", dtype=torch.bfloat16)
    results = []
    for flash in (library_function("flash-attn"), None):
        monkeypatch.setattr(attention, "flash_attention", lambda _, flash=flash: flash)
        results.append(core(query, key, value))
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)
