"""The GPU's norm of the rows, interpreted, against the naive one by autograd."""

import pytest
import torch

from tide_mega.kernels.row_norm import naive, row_norm


def gradients(version, rows, gains, seed):
    leaves = [rows.clone().requires_grad_(), gains.clone().requires_grad_()]
    out = row_norm(version, *leaves, 1e-5)
    return out, *torch.autograd.grad(out, leaves, seed.to(out.dtype))


def draw(types, blocks, width, dtype):
    generator = torch.Generator().manual_seed(types + width)
    shape = (types, blocks, width)
    rows, gains = torch.randn(shape, generator=generator), torch.rand(shape[1:], generator=generator) + 0.5
    return rows.to(dtype), gains.to(dtype), torch.randn(shape, generator=generator).to(dtype)


def check(types, blocks, width, dtype, programs):
    from tide_mega.kernels.row_norm import triton as fused

    fused.BACKWARD_PROGRAMS = programs
    rows, gains, seed = draw(types, blocks, width, dtype)
    exact = gradients("naive", rows.float(), gains.float(), seed.float())
    first, second = (gradients("triton", rows, gains, seed) for _ in range(2))
    for got, again, expected in zip(first, second, exact, strict=True):
        assert torch.equal(got, again)
        assert got.dtype == dtype
        # The interpreter cuts off the bits that bfloat16 lacks, where a GPU rounds.
        rtol = 1e-5 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(got.float(), expected, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("types", "blocks", "width"), [(1, 1, 1), (7, 3, 20), (5, 24, 33), (12, 2, 64)])
@pytest.mark.parametrize("programs", [1, 5, 1024])
def test_output_and_gradients_equal_the_naive_norm(interpreted, types, blocks, width, dtype, programs):
    interpreted(check, types, blocks, width, dtype, programs)


def check_empty_and_zero():
    out, grad_rows, grad_gains = gradients("triton", *draw(0, 2, 6, torch.float32))
    assert out.shape == grad_rows.shape == (0, 2, 6)
    assert torch.equal(grad_gains, torch.zeros(2, 6))
    rows, gains, _ = draw(2, 2, 6, torch.float32)
    assert torch.equal(row_norm("triton", rows * 0, gains, 1e-5), naive.row_norm(rows * 0, gains, 1e-5))


def test_no_rows_and_rows_of_zeros(interpreted):
    interpreted(check_empty_and_zero)
