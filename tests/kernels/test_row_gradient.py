"""The rows' gradient: versions against the oracle, and what the sink keeps apart."""

import pytest
import torch

from tests.support.mixes import CASES, MixCase, indices
from tide_mega.kernels.row_gradient import RowGradient, cpu, naive
from tide_mega.kernels.token_order import TokenOrder


def left_by_layers(case, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    order = TokenOrder.sort(indices(case, g), case.rows)
    alphas = [torch.rand(case.tokens, case.blocks + 1, generator=g) for _ in range(case.layers)]
    gradients = [torch.randn(case.tokens, case.width, generator=g).to(dtype) for _ in range(case.layers)]
    return order, alphas, gradients


def summed(version, case, start, left):
    total = start.clone()
    version.add_rows(total, *left)
    return total


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_equals_the_oracle_and_itself(case, dtype, monkeypatch):
    monkeypatch.setattr(cpu, "CHUNK_VALUES", 3 * case.blocks * case.width)  # several chunks, some empty
    start = torch.randn(case.rows, case.blocks, case.width)
    left = left_by_layers(case, dtype)
    exact = summed(naive, case, start, left)
    first, second = (summed(cpu, case, start, left) for _ in range(2))
    torch.testing.assert_close(first, exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(first, second)


def test_the_oracle_equals_a_hand_made_sum():
    order = TokenOrder.sort(torch.tensor([1, 0, 1]), 3)
    alpha = torch.tensor([[0.5, 0.5], [0.25, 0.75], [1.0, 0.0]])
    gradient = torch.tensor([[2.0, 4.0], [8.0, 8.0], [1.0, 0.0]])
    total = torch.ones(3, 1, 2)
    naive.add_rows(total, order, [alpha], [gradient])
    assert total.tolist() == [[[3.0, 3.0]], [[3.0, 3.0]], [[1.0, 1.0]]]


@pytest.mark.parametrize("num_layers", [1, 2, 5])
def test_microbatches_do_not_mix_however_many_layers_are_held(num_layers):
    case = MixCase(tokens=20, rows=6, blocks=2, width=4, layers=2)
    microbatches = [left_by_layers(case, seed=seed) for seed in range(3)]
    sink = RowGradient(torch.Size((6, 2, 4)), torch.device("cpu"), "cpu", num_layers)
    assert sink.is_empty
    exact = torch.zeros(6, 2, 4)
    for order, alphas, gradients in microbatches:
        naive.add_rows(exact, order, alphas, gradients)
        for alpha, gradient in zip(alphas, gradients, strict=True):
            sink.add(order, alpha, gradient)
    assert not sink.is_empty
    torch.testing.assert_close(sink.total(), exact)
    torch.testing.assert_close(sink.total(), exact)  # asking twice adds nothing


@pytest.mark.parametrize("version", ["naive", "cpu"])
def test_autograd_does_not_change_a_gradient_that_the_sink_still_holds(version):
    from tide_mega.kernels.mix import mix

    order = TokenOrder.sort(torch.tensor([0, 1, 1]), 2)
    rows = torch.randn(2, 2, 4)
    sink = RowGradient(rows.shape, rows.device, version, 2)
    x = torch.randn(3, 4, requires_grad=True)
    logits = torch.randn(3, 3, requires_grad=True)
    # The residual's gradient is the very tensor that the sink holds; a second use of x adds to it.
    out, alpha = mix(version, logits, x * 1.0, torch.zeros(3, 4), rows, order, sink)
    seed = torch.randn(3, 4)
    (out * 1.0 + (x * 1.0) * 3.0).backward(seed)
    exact = torch.zeros(2, 2, 4)
    naive.add_rows(exact, order, [alpha], [seed])
    torch.testing.assert_close(sink.total(), exact)
