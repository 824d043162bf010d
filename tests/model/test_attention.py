"""Core attention: rotary positions, grouped queries and the causal mask against the reference's formulas."""

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType

from tide_mega.model.modules import CausalCoreAttention
from tide_mega.model.reference import rotate
from tide_mega.parallel.determinism import deterministic_algorithms
from tide_mega.parallel.device import Device


def core(theta=10_000.0):
    return CausalCoreAttention(None, 1, AttnMaskType.causal, "self", rope_theta=theta)


def plain(query, key, value, theta):
    """Attention of [S, B, heads, C] written out."""
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    query, key = rotate(query, theta), rotate(key, theta)
    repeats = query.size(1) // key.size(1)
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) / query.size(-1) ** 0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(later, float("-inf")).softmax(-1) @ value
    return mixed.permute(2, 0, 1, 3).flatten(2)


@pytest.mark.parametrize(("heads", "groups", "has_kernel"), [(4, 4, True), (6, 2, True), (6, 2, False)])
def test_attention_equals_the_written_out_formula_with_gradients(heads, groups, has_kernel, monkeypatch):
    monkeypatch.setattr("tide_mega.model.modules.takes_groups", lambda _: has_kernel)
    torch.manual_seed(heads)
    query = torch.randn(9, 2, heads, 8, requires_grad=True)
    key, value = (torch.randn(9, 2, groups, 8, requires_grad=True) for _ in range(2))
    inputs = (query, key, value)
    actual, expected = core()(*inputs), plain(*inputs, 10_000.0)
    torch.testing.assert_close(actual, expected)
    seed = torch.randn_like(expected)
    gradients = zip(
        torch.autograd.grad(actual, inputs, seed), torch.autograd.grad(expected, inputs, seed), strict=True
    )
    for value, right in gradients:
        torch.testing.assert_close(value, right)


def test_theta_reaches_the_angles():
    query, key, value = torch.randn(3, 9, 1, 2, 8)
    assert not torch.allclose(core(10_000.0)(query, key, value), core(500_000.0)(query, key, value))


def test_another_mask_is_refused():
    with pytest.raises(ValueError, match="cannot do self attention"):
        CausalCoreAttention(None, 1, AttnMaskType.padding, "self", rope_theta=1e4)


def test_flash_attn_gets_16_bits_alone_in_its_own_layout_and_gives_the_same(monkeypatch):
    seen = []

    def flash(query, key, value, *, causal, deterministic):
        """As flash-attn computes it, from [B, S, heads, C]."""
        seen.append((tuple(query.shape), tuple(key.shape), causal, deterministic))
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(*heads_first, is_causal=causal, enable_gqa=True)
        return out.transpose(1, 2)

    torch.manual_seed(0)
    query, key, value = torch.randn(9, 2, 6, 8), torch.randn(9, 2, 2, 8), torch.randn(9, 2, 2, 8)
    single = [x.bfloat16() for x in (query, key, value)]
    expected = core()(*single)
    monkeypatch.setattr("tide_mega.model.modules.flash_attention", lambda _: flash)
    torch.testing.assert_close(core()(*single), expected)
    with deterministic_algorithms(True, Device(torch.device("cpu"), "gloo", "cpu")):
        core()(*single)
    assert seen == [((2, 9, 6, 8), (2, 9, 2, 8), True, deterministic) for deterministic in (False, True)]
    core()(query, key, value)
    assert len(seen) == 2
