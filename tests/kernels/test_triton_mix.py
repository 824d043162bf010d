"""The GPU mix, interpreted: output, weights and every gradient against the naive mix by autograd."""

import pytest
import torch

from tide_mega.kernels.mix import mix
from tide_mega.kernels.mix.naive import mix as naive_mix
from tide_mega.kernels.row_gradient import RowGradient
from tide_mega.kernels.token_order import TokenOrder

TRUNCATED = 2**-7
"""What bfloat16 loses of a value at most, when bits are cut off once."""
SHAPES = {
    "one row": ([0] * 9, 1, 3, 20),
    "every token its own row": (list(range(10))[::-1], 10, 2, 16),
    "rows absent": ([5, 2, 5, 5, 2, 9, 9], 12, 8, 24),
    "one frequent row": ([3] * 30 + [0, 7, 7], 8, 4, 48),
    "one block": ([1, 0, 1], 2, 1, 7),
    "many blocks": ([4, 4, 1, 0, 4], 5, 24, 33),
    "one token": ([2], 3, 5, 16),
}


def inputs(ids, rows, blocks, width, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    tokens = len(ids)
    leaves = (draw(tokens, blocks + 1), draw(tokens, width), draw(tokens, width), draw(rows, blocks, width))
    return (
        leaves,
        TokenOrder.sort(torch.tensor(ids), rows),
        torch.randn(tokens, width, generator=generator).to(dtype),
    )


def fused(leaves, order, seed, layers=1):
    """Output, α, and the gradients of logits, residual, ffn and rows."""
    *inner, rows = leaves
    sink = RowGradient(rows.shape, rows.device, "triton", layers)
    out, alpha = mix("triton", *inner, rows, order, sink)
    return out, alpha, *torch.autograd.grad(out, inner, seed), sink.total()


def oracle(leaves, order, seed, dtype=None):
    leaves = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in leaves]
    out, alpha = naive_mix(*leaves, order.index_N)
    return out, alpha, *torch.autograd.grad(out, leaves, seed.to(dtype or seed.dtype))


def check_fp32(case):
    leaves, order, seed = inputs(*SHAPES[case], torch.float32)
    for got, expected in zip(fused(leaves, order, seed), oracle(leaves, order, seed), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def check_bf16(case):
    leaves, order, seed = inputs(*SHAPES[case], torch.bfloat16)
    exact = oracle(leaves, order, seed, torch.float32)
    dtypes = [torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32]
    for got, expected, dtype in zip(fused(leaves, order, seed), exact, dtypes, strict=True):
        assert got.dtype == dtype
        # The interpreter cuts bits off where a GPU rounds.
        rtol, atol = (TRUNCATED, 1e-5) if dtype == torch.bfloat16 else (1e-4, 1e-4)
        torch.testing.assert_close(got.float(), expected, rtol=rtol, atol=atol)


def check_random():
    generator = torch.Generator().manual_seed(11)

    def number(least, most):
        return int(torch.randint(least, most + 1, (), generator=generator))

    for seed in range(8):
        rows, blocks, width, tokens = number(1, 20), number(1, 12), number(1, 70), number(1, 40)
        ids = torch.randint(0, rows, (tokens,), generator=generator).tolist()
        leaves, order, gradient = inputs(ids, rows, blocks, width, torch.float32, seed)
        for got, expected in zip(
            fused(leaves, order, gradient), oracle(leaves, order, gradient), strict=True
        ):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def check_output_and_views():
    """Leading dimensions, inputs that are views, no sink: an output of its own, the same values."""
    ids, rows, blocks, width = SHAPES["rows absent"]
    (logits, _, _, memory), order, _ = inputs(ids, rows, blocks, width, torch.float32)
    generator = torch.Generator().manual_seed(1)
    residual, ffn = (
        torch.randn(1, width, len(ids), generator=generator).mT.requires_grad_() for _ in range(2)
    )
    out, alpha = mix("triton", logits, residual, ffn, memory, order, None)
    expected, _ = naive_mix(logits, residual, ffn, memory, order.index_N)
    torch.testing.assert_close(out, expected)
    assert out.shape == residual.shape and out.is_contiguous() and not out._is_view()
    assert not alpha.requires_grad
    seed = torch.randn(1, width, len(ids), generator=generator).mT
    of = (logits, residual, ffn)
    got, wanted = torch.autograd.grad(out, of, seed), torch.autograd.grad(expected, of, seed)
    assert got[1].data_ptr() == got[2].data_ptr() == seed.data_ptr()
    for actual, expected in zip(got, wanted, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def check_two_layers():
    ids, rows, blocks, width = SHAPES["one frequent row"]
    memory = torch.randn(rows, blocks, width)
    order = TokenOrder.sort(torch.tensor(ids), rows)
    sink, expected = RowGradient(memory.shape, memory.device, "triton", 2), torch.zeros(memory.shape)
    for seed in range(4):  # two microbatches
        (*inner, _), _, gradient = inputs(ids, rows, blocks, width, torch.float32, seed)
        mix("triton", *inner, memory, order, sink)[0].backward(gradient)
        expected += oracle((*inner, memory), order, gradient)[-1]
    torch.testing.assert_close(sink.total(), expected, rtol=1e-5, atol=1e-5)


def check_repeatable():
    leaves, order, seed = inputs(*SHAPES["one frequent row"], torch.bfloat16)
    for first, second in zip(fused(leaves, order, seed), fused(leaves, order, seed), strict=True):
        assert torch.equal(first, second)


def check_refusals():
    (logits, residual, ffn, memory), order, _ = inputs(*SHAPES["one row"], torch.float32)
    with pytest.raises(ValueError, match=r"9 tokens and 3 blocks need \[9, 4\]"):
        mix("triton", logits[:, 1:], residual, ffn, memory, order, None)
    with pytest.raises(ValueError, match=r"must be alike: \[..., 20\] with 9 tokens"):
        mix("triton", logits, residual, ffn[1:], memory, order, None)


@pytest.mark.parametrize("case", SHAPES)
def test_fp32_equals_the_naive_mix(interpreted, case):
    interpreted(check_fp32, case)


@pytest.mark.parametrize("case", SHAPES)
def test_bf16_is_the_exact_result_rounded_once(interpreted, case):
    interpreted(check_bf16, case)


def test_random_shapes_equal_the_naive_mix(interpreted):
    interpreted(check_random)


def test_leading_dimensions_and_views_give_an_output_of_its_own(interpreted):
    interpreted(check_output_and_views)


def test_layers_of_a_microbatch_are_added_at_once(interpreted):
    interpreted(check_two_layers)


def test_repeats_are_equal_to_the_last_bit(interpreted):
    interpreted(check_repeatable)


def test_shapes_that_do_not_belong_together_are_refused(interpreted):
    interpreted(check_refusals)
