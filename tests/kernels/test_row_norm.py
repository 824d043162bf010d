"""RMSNorm of rows: the oracle by hand, the CPU version against it."""

import pytest
import torch

from tide_mega.kernels.row_norm import cpu, naive, row_norm


def test_the_oracle_by_hand():
    rows = torch.tensor([[[3.0, 4.0]]])
    out = naive.row_norm(rows, torch.tensor([[1.0, 2.0]]), eps=0.0)
    scale = 12.5**0.5  # root of the mean square
    torch.testing.assert_close(out, torch.tensor([[[3 / scale, 8 / scale]]]))


@pytest.mark.parametrize("shape", [(1, 1, 3), (7, 3, 5), (40, 8, 33), (0, 2, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_equals_autograd_through_the_oracle(shape, dtype, monkeypatch):
    monkeypatch.setattr(cpu, "CHUNK_VALUES", 100)
    torch.manual_seed(sum(shape))
    rows = torch.randn(shape).to(dtype)
    gains = torch.randn(shape[1:]).to(dtype)
    seed = torch.randn(shape).to(dtype)
    results = []
    for version in ("naive", "cpu"):
        leaves = [rows.clone().requires_grad_(), gains.clone().requires_grad_()]
        out = row_norm(version, *leaves, 1e-5)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, seed)])
    tolerance = {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-7}
    for expected, actual in zip(*results, strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected, **tolerance)
