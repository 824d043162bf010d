"""The chunked vocabulary loss and the rotation on a CUDA device, compiled and not."""

import pytest
import torch

from tide_mega.kernels.compiled import compiled
from tide_mega.kernels.rope import rotate, rotation
from tide_mega.kernels.vocab_loss import naive, vocab_loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("compile_kernels", [True, False])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
def test_loss_and_gradients_equal_the_naive_ones(dtype, bound, compile_kernels):
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    hidden = torch.randn(700, 64, device="cuda", dtype=dtype, requires_grad=True)
    weight = (torch.randn(1000, 64, device="cuda") / 8).to(dtype).requires_grad_()
    labels = torch.randint(-1, 1000, (700,), device="cuda")
    results = []
    for function, options in (
        (naive.vocab_loss, {}),
        (vocab_loss, {"chunk_tokens": 256, "compile_kernels": compile_kernels}),
    ):
        loss, cross_entropy, *_ = function(hidden, weight, labels, 1e-3, **options)
        results.append((loss, cross_entropy, *torch.autograd.grad(loss / 3, (hidden, weight))))
    for right, value in zip(*results, strict=True):
        assert (value - right).float().norm() <= bound * right.float().norm()


def test_no_step_of_the_loss_waits_for_the_gpu():
    hidden = torch.randn(64, 8, device="cuda", requires_grad=True)
    weight = torch.randn(40, 8, device="cuda", requires_grad=True)
    labels = torch.randint(-1, 40, (64,), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        vocab_loss(hidden, weight, labels, 1e-3, chunk_tokens=24)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_rotation_equals_eager():
    device = torch.device("cuda", 0)
    query, key = (torch.randn(64, 2, heads, 32, device=device, dtype=torch.bfloat16) for heads in (8, 4))
    angles = rotation(64, 32, 500_000.0, device)
    for value, right in zip(
        compiled(rotate, device, True)(query, key, *angles), rotate(query, key, *angles), strict=True
    ):
        torch.testing.assert_close(value, right, rtol=2**-7, atol=1e-3)
