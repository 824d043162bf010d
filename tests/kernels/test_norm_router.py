"""The norm with the router in torch: by hand, and the one-pass gradient of what both uses share."""

import torch
import torch.nn.functional as F

from tide_mega.kernels.norm_router import norm_and_route
from tide_mega.kernels.norm_router.naive import route


def test_output_and_logits_by_hand():
    hidden, router = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0], [1.0, -1.0], [0.0, 2.0]])
    normed, logits = norm_and_route("naive", hidden, torch.tensor([1.0, 2.0]), router, 0.0)
    scale = 12.5**0.5  # root of the mean square
    torch.testing.assert_close(normed, torch.tensor([[3 / scale, 8 / scale]]))
    torch.testing.assert_close(logits, torch.tensor([[3 / scale, -5 / scale, 16 / scale]]))


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
