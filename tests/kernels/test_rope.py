"""Rotary positions against the reference's, bit for bit, and compiled."""

import shutil

import pytest
import torch

from tide_mega.kernels.rope import rotate, rotation
from tide_mega.model.reference import rotate as reference_rotate

CPU = torch.device("cpu")


def reference(x_SBHC, theta):
    return reference_rotate(x_SBHC.permute(1, 2, 0, 3), theta).permute(2, 0, 1, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("length", "batch", "heads", "keys", "size"), [(1, 1, 1, 1, 2), (7, 2, 6, 3, 10)])
def test_rotation_equals_the_references_with_gradients(dtype, length, batch, heads, keys, size):
    torch.manual_seed(size)
    query = torch.randn(length, batch, heads, size, dtype=dtype, requires_grad=True)
    # As megatron gives it: a view into the joint projection.
    joint = torch.randn(length, batch, keys, 3 * size, dtype=dtype, requires_grad=True)
    key = joint[..., size : 2 * size]
    turned = rotate(query, key, *rotation(length, size, 10_000.0, CPU))
    wide = query.float(), key.float()
    expected = [reference(x, 10_000.0).to(dtype) for x in wide]  # in fp32, rounded once
    seeds = [torch.randn_like(x) for x in expected]
    gradients = torch.autograd.grad(turned, (query, joint), seeds)
    wanted = torch.autograd.grad(expected, (query, joint), seeds)
    for actual, right in zip((*turned, *gradients), (*expected, *wanted), strict=True):
        assert torch.equal(actual, right)


def test_a_quarter_turn_by_hand():
    cos, sin = rotation(2, 2, 10_000.0, CPU)
    query = torch.tensor([[3.0, 4.0], [3.0, 4.0]])[:, None, None]
    turned, _ = rotate(query, query, cos, sin)
    c, s = torch.cos(torch.tensor(1.0)), torch.sin(torch.tensor(1.0))
    torch.testing.assert_close(turned[0, 0, 0], torch.tensor([3.0, 4.0]))
    torch.testing.assert_close(turned[1, 0, 0], torch.stack((3 * c - 4 * s, 4 * c + 3 * s)))


def test_angles_are_shared_and_differ_by_theta():
    cos, _ = rotation(5, 8, 500_000.0, CPU)
    assert rotation(5, 8, 500_000.0, CPU)[0] is cos
    assert not torch.equal(rotation(5, 8, 10_000.0, CPU)[0], cos)


def test_angles_first_made_in_inference_mode_serve_training():
    with torch.inference_mode():
        rotation(3, 4, 77.0, CPU)
    query = torch.randn(3, 1, 1, 4, requires_grad=True)
    turned, _ = rotate(query, query, *rotation(3, 4, 77.0, CPU))
    turned.sum().backward()
    assert query.grad is not None


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_compiled_rotation_equals_eager():
    angles = rotation(6, 8, 10_000.0, CPU)
    query, key = torch.randn(6, 2, 4, 8, requires_grad=True), torch.randn(6, 2, 2, 8, requires_grad=True)
    seeds = torch.randn(6, 2, 4, 8), torch.randn(6, 2, 2, 8)
    results = []
    for turn in (rotate, torch.compile(rotate)):
        turned = turn(query, key, *angles)
        results.append((*turned, *torch.autograd.grad(turned, (query, key), seeds)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)
