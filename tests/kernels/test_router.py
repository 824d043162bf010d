"""Router logits, and the one-pass gradient of their input."""

import torch
import torch.nn.functional as F

from tide_mega.kernels.router import route


def test_both_uses_of_the_input_reach_its_gradient():
    torch.manual_seed(0)
    normed, router = torch.randn(6, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    weight, seed_ffn, seed_logits = torch.randn(3, 5), torch.randn(6, 3), torch.randn(6, 4)

    kept, logits = route(normed, router)
    torch.testing.assert_close(kept, normed)
    loss = (F.linear(kept, weight) * seed_ffn).sum() + (logits * seed_logits).sum()
    ours = torch.autograd.grad(loss, (normed, router))

    plain = (F.linear(normed, weight) * seed_ffn).sum() + (F.linear(normed, router) * seed_logits).sum()
    for a, e in zip(ours, torch.autograd.grad(plain, (normed, router)), strict=True):
        torch.testing.assert_close(a, e)
