"""The GPU's norm with the router, interpreted: outputs and every gradient against torch's by autograd."""

import pytest
import torch
import torch.nn.functional as F

from tide_mega.kernels.norm_router import norm_and_route

TRUNCATED = 2**-7
"""What bfloat16 loses of a value at most, when bits are cut off once."""
SHAPES = {  # tokens, banks, width
    "one value": (1, 1, 1),
    "one token": (1, 2, 7),
    "odd width": (37, 9, 33),
    "many banks": (20, 25, 40),
    "most banks": (18, 64, 12),
    "several tiles of the width": (21, 3, 300),
    "several chunks": (90, 5, 48),
}


def inputs(case, dtype, seed=0):
    tokens, banks, width = SHAPES[case]
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    leaves = [draw(tokens, width), 1 + draw(width) / 4, draw(banks, width)]
    return [leaf.requires_grad_() for leaf in leaves], [draw(tokens, width), draw(tokens, banks)]


def oracle(leaves, seeds):
    """In fp64, by nothing but autograd."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    hidden, gain, router = leaves
    normed = hidden * (hidden.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * gain
    outputs = normed, F.linear(normed, router)
    return [*outputs, *torch.autograd.grad(outputs, leaves, [seed.double() for seed in seeds])]


def fused(leaves, seeds):
    outputs = norm_and_route("triton", *leaves, 1e-5)
    return [*outputs, *torch.autograd.grad(outputs, leaves, seeds)]


def set_programs(programs):
    from tide_mega.kernels.norm_router import router_gradient, triton

    triton.BACKWARD_PROGRAMS = router_gradient.ROUTER_PROGRAMS = programs


def check(case, dtype, programs):
    set_programs(programs)
    leaves, seeds = inputs(case, dtype)
    for got, expected in zip(fused(leaves, seeds), oracle(leaves, seeds), strict=True):
        assert got.dtype == dtype and got.is_contiguous()
        scale = max(1.0, float(expected.abs().max()))
        # The logits and the router's gradient are sums over values that are rounded themselves.
        rtol, atol = (1e-5, 2e-6 * scale) if dtype == torch.float32 else (TRUNCATED, TRUNCATED * scale)
        torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=atol)


def check_logits_of_the_rounded_state():
    leaves, _ = inputs("odd width", torch.bfloat16)
    normed, logits = norm_and_route("triton", *leaves, 1e-5)
    exact = F.linear(normed.double(), leaves[2].double())
    torch.testing.assert_close(logits.double(), exact, rtol=TRUNCATED, atol=1e-6)


def check_repeatable():
    set_programs(3)
    leaves, seeds = inputs("several chunks", torch.bfloat16)
    for first, second in zip(fused(leaves, seeds), fused(leaves, seeds), strict=True):
        assert torch.equal(first, second)


def check_views_and_partial_use():
    leaves, seeds = inputs("odd width", torch.float32)
    hidden, gain, router = leaves
    turned = hidden.detach().T.contiguous().T.requires_grad_()
    expected = oracle(leaves, seeds)
    normed, logits = norm_and_route("triton", turned, gain, router, 1e-5)
    got = torch.autograd.grad(
        (normed, logits), (turned, gain, router), [seed.T.contiguous().T for seed in seeds]
    )
    for value, right in zip(got, expected[2:], strict=True):
        torch.testing.assert_close(value.double(), right, rtol=1e-5, atol=1e-5)
    for used in (0, 1):
        alone = [seed if place == used else torch.zeros_like(seed) for place, seed in enumerate(seeds)]
        output = norm_and_route("triton", *leaves, 1e-5)[used]
        got = torch.autograd.grad(output, leaves, seeds[used])
        for value, right in zip(got, oracle(leaves, alone)[2:], strict=True):
            torch.testing.assert_close(value.double(), right, rtol=1e-5, atol=1e-5)


def check_empty_and_zero():
    leaves, _ = inputs("odd width", torch.float32)
    nothing = leaves[0][:0].detach().requires_grad_()
    outputs = norm_and_route("triton", nothing, *leaves[1:], 1e-5)
    assert [tuple(output.shape) for output in outputs] == [(0, 33), (0, 9)]
    gradients = torch.autograd.grad(outputs, leaves[1:], [torch.zeros_like(output) for output in outputs])
    assert not any(gradient.any() for gradient in gradients)
    outputs = norm_and_route("triton", leaves[0] * 0, *leaves[1:], 1e-5)
    assert not any(output.any() for output in outputs)


def check_refusals():
    (hidden, gain, router), _ = inputs("odd width", torch.float32)
    with pytest.raises(ValueError, match=r"router \[9, 32\] must be \[N, D\], \[D\] and \[J, D\]"):
        norm_and_route("triton", hidden, gain, router[:, 1:], 1e-5)
    with pytest.raises(ValueError, match=r"router torch\.bfloat16: both must be the same"):
        norm_and_route("triton", hidden, gain, router.bfloat16(), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("programs", [1, 3, 256])
@pytest.mark.parametrize("case", SHAPES)
def test_outputs_and_gradients_equal_autograds(interpreted, case, dtype, programs):
    interpreted(check, case, dtype, programs)


def test_logits_come_from_the_state_as_it_is_rounded(interpreted):
    interpreted(check_logits_of_the_rounded_state)


def test_repeats_are_equal_to_the_last_bit(interpreted):
    interpreted(check_repeatable)


def test_views_and_the_use_of_one_output_alone(interpreted):
    interpreted(check_views_and_partial_use)


def test_no_tokens_and_tokens_of_zeros(interpreted):
    interpreted(check_empty_and_zero)


def test_shapes_and_dtypes_that_do_not_belong_together_are_refused(interpreted):
    interpreted(check_refusals)
