"""The naive mix against a loop over tokens and blocks, gradients included."""

import pytest
import torch

from tide_mega.kernels.mix.naive import mix_by_index


@pytest.mark.parametrize(("tokens", "types", "blocks", "width"), [(7, 1, 1, 4), (12, 5, 3, 6), (9, 9, 8, 5)])
def test_mix_equals_a_loop(tokens, types, blocks, width):
    torch.manual_seed(tokens)
    normed = torch.randn(tokens, width, requires_grad=True)
    router = torch.randn(blocks + 1, width, requires_grad=True)
    memory = torch.randn(types, blocks, width, requires_grad=True)
    index = torch.randint(0, types, (tokens,))
    inputs = (normed, router, memory)

    injected, null = mix_by_index(*inputs, index)
    rows = []
    for n in range(tokens):
        alpha = (router @ normed[n]).softmax(0)
        rows.append(sum(alpha[k] * memory[index[n], k] for k in range(blocks)))
        assert float(null[n]) == pytest.approx(float(alpha[blocks]), rel=1e-5)
    expected = torch.stack(rows)
    torch.testing.assert_close(injected, expected)

    seed = torch.randn_like(expected)
    actual = torch.autograd.grad(injected, inputs, seed)
    for a, e in zip(actual, torch.autograd.grad(expected, inputs, seed), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


def test_null_weight_carries_no_gradient():
    _, null = mix_by_index(
        torch.randn(3, 4, requires_grad=True),
        torch.randn(3, 4),
        torch.randn(2, 2, 4),
        torch.tensor([0, 1, 1]),
    )
    assert not null.requires_grad
