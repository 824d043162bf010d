"""The mix: the oracle against a loop over tokens and blocks, other versions against the oracle."""

import pytest
import torch

from tests.support.mixes import CASES, actual, expected, inputs, worst_errors
from tide_mega.kernels.mix import mix, naive
from tide_mega.kernels.row_gradient import RowGradient
from tide_mega.kernels.token_order import TokenOrder


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_the_oracle_equals_a_loop(case):
    layers, rows, index, seeds = inputs(case, torch.float64)
    leaves = [t.requires_grad_() for t in [*layers[0], rows]]
    logits, residual, ffn, rows = leaves
    out, alpha = naive.mix(logits, residual, ffn, rows, index)
    looped = []
    for n in range(case.tokens):
        weights = logits[n].exp() / logits[n].exp().sum()
        injected = sum(weights[k] * rows[index[n], k] for k in range(case.blocks))
        looped.append(residual[n] + ffn[n] + injected)
        torch.testing.assert_close(alpha[n].double(), weights.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(out, torch.stack(looped), rtol=1e-6, atol=1e-6)
    ours = torch.autograd.grad(out, leaves, seeds[0])
    theirs = torch.autograd.grad(torch.stack(looped), leaves, seeds[0])
    for a, e in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("version", ["naive", "cpu"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_version_equals_the_oracle_in_fp32(case, version):
    errors = worst_errors(actual(case, torch.float32, version), expected(case, torch.float32, wide=True))
    assert max(errors.values()) < 2e-6, errors


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bf16_is_no_worse_than_the_oracle_in_bf16(case):
    exact = expected(case, torch.bfloat16, wide=True)
    naive_errors = worst_errors(expected(case, torch.bfloat16), exact)
    errors = worst_errors(actual(case, torch.bfloat16, "cpu"), exact)
    for key, error in errors.items():
        assert error <= 1.5 * naive_errors[key] + 2**-9, (key, errors, naive_errors)


def test_the_output_keeps_the_shape_of_the_residual_and_is_no_view():
    order = TokenOrder.sort(torch.tensor([0, 1, 1, 0, 1, 0]), 2)
    rows, logits = torch.randn(2, 2, 4), torch.randn(6, 3)
    for version in ("naive", "cpu"):
        out, _ = mix(version, logits, torch.randn(3, 2, 4), torch.randn(3, 2, 4), rows, order, None)
        assert out.shape == (3, 2, 4)
        assert out._base is None


def test_nothing_is_left_with_a_sink_where_no_gradient_flows():
    order = TokenOrder.sort(torch.tensor([0, 1]), 2)
    rows = torch.randn(2, 2, 4)
    sink = RowGradient(rows.shape, rows.device, "cpu", 1)
    with torch.no_grad():
        mix("cpu", torch.randn(2, 3), torch.randn(2, 4), torch.randn(2, 4), rows, order, sink)
    assert sink.is_empty


@pytest.mark.parametrize("version", ["naive", "cpu"])
def test_alpha_carries_no_gradient(version):
    order = TokenOrder.sort(torch.tensor([0, 1]), 2)
    leaves = [torch.randn(*shape, requires_grad=True) for shape in ((2, 3), (2, 4), (2, 4))]
    rows = torch.randn(2, 2, 4)
    out, alpha = mix(version, *leaves, rows, order, RowGradient(rows.shape, rows.device, version, 1))
    assert out.requires_grad
    assert not alpha.requires_grad
