"""The chunked vocabulary loss against the naive one, in one process."""

import math
import shutil

import pytest
import torch

from tide_mega.kernels.vocab_loss import naive
from tide_mega.kernels.vocab_loss.chunked import CPU_CHUNK_TOKENS, tokens_of_a_chunk, vocab_loss
from tide_mega.kernels.vocab_loss.softmax import EagerSoftmax, log_partition, softmax_gradient_


def inputs(tokens, vocabulary, width, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(-1, vocabulary, (tokens,), generator=generator)
    labels[0] = vocabulary - 1
    return hidden, weight, labels


def with_gradients(function, hidden, weight, labels, z_loss, incoming=0.3, **options):
    loss, *sums = function(hidden, weight, labels, z_loss, **options)
    gradients = torch.autograd.grad(loss, (hidden, weight), torch.tensor(incoming))
    return [loss.detach(), *sums, *gradients]


@pytest.mark.parametrize("chunk", [1, 5, 12, 37, 1000, None])
@pytest.mark.parametrize("z_loss", [0.0, 0.05])
@pytest.mark.parametrize(("tokens", "vocabulary", "width"), [(37, 23, 8), (24, 101, 5), (1, 3, 2)])
def test_loss_sums_and_gradients_equal_the_naive_ones(tokens, vocabulary, width, z_loss, chunk):
    drawn = inputs(tokens, vocabulary, width, seed=tokens)
    expected = with_gradients(naive.vocab_loss, *drawn, z_loss)
    actual = with_gradients(vocab_loss, *drawn, z_loss, chunk_tokens=chunk)
    for right, value in zip(expected, actual, strict=True):
        torch.testing.assert_close(value, right, rtol=2e-5, atol=1e-6)


def test_two_equal_logits_by_hand():
    # One token, logits (0, 0): ce = ln 2, log Z = ln 2, d/d logits = ±1/2 plus z · 2 ln 2 · 1/2.
    hidden = torch.zeros(1, 1, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    loss, cross_entropy, z_square, count = vocab_loss(hidden, weight, torch.tensor([0]), 0.5)
    loss.backward()
    ln2 = math.log(2)
    assert float(loss) == pytest.approx(ln2 + 0.5 * ln2**2)
    assert cross_entropy.tolist() == pytest.approx([ln2])
    assert (float(z_square), int(count)) == (pytest.approx(ln2**2), 1)
    assert float(hidden.grad) == pytest.approx(-1.0)
    assert weight.grad.tolist() == [[0.0], [0.0]]


def test_huge_logits_stay_finite():
    hidden, weight, labels = inputs(9, 11, 4)
    for value in with_gradients(vocab_loss, hidden * 1e3, weight * 1e3, labels, 1e-4):
        assert value.isfinite().all()


def test_unlabelled_tokens_contribute_nothing():
    hidden, weight, labels = inputs(20, 13, 6)
    kept = torch.arange(20) % 3 > 0
    labels = labels.clamp_min(0).masked_fill(~kept, -100)
    loss, cross_entropy, z_square, count, grad_hidden, grad_weight = with_gradients(
        vocab_loss, hidden, weight, labels, 0.1, chunk_tokens=6
    )
    alone = with_gradients(vocab_loss, hidden[kept], weight, labels[kept], 0.1)
    assert int(count) == int(kept.sum())
    assert not cross_entropy[~kept].any() and not grad_hidden[~kept].any()
    torch.testing.assert_close(loss, alone[0])
    torch.testing.assert_close(z_square, alone[2])
    torch.testing.assert_close(grad_weight, alone[5])


@pytest.mark.parametrize("function", [vocab_loss, naive.vocab_loss])
def test_a_microbatch_of_padding_weighs_nothing(function):
    hidden, weight, _ = inputs(4, 5, 3)
    loss, cross_entropy, z_square, count, *gradients = with_gradients(
        function, hidden, weight, torch.full((4,), -1), 0.1
    )
    assert not loss and not any(gradient.any() for gradient in gradients)
    assert not cross_entropy.any() and not z_square and not count


@pytest.mark.parametrize("incoming", [1.0, 1 / 3])
def test_bf16_errs_no_more_than_rounding_the_results(incoming):
    hidden, weight, labels = inputs(640, 300, 64, torch.bfloat16)
    weight = (weight.detach() / 8).requires_grad_()
    exact = with_gradients(naive.vocab_loss, hidden, weight, labels, 1e-3, incoming)
    actual = with_gradients(vocab_loss, hidden, weight, labels, 1e-3, incoming, chunk_tokens=100)
    assert actual[4].dtype == actual[5].dtype == torch.bfloat16
    torch.testing.assert_close(actual[0], exact[0], rtol=1e-3, atol=0)
    for value, right in zip(actual[4:], exact[4:], strict=True):
        value, right = value.float(), right.float()
        assert (value - right).norm() < 2**-8 * right.norm()
        # No factor common to all: 1/3 itself is not rounded to bf16.
        assert float((value * right).sum() / right.square().sum()) == pytest.approx(1.0, abs=5e-4)


def test_bf16_keeps_the_gradient_of_an_almost_certain_token():
    hidden = torch.tensor([[7.0]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.bfloat16, requires_grad=True)
    *_, grad_weight = with_gradients(vocab_loss, hidden, weight, torch.tensor([0]), 0.0, 1.0)
    assert float(grad_weight[0]) == pytest.approx(-7 / (1 + math.exp(7)), rel=1e-2)


@pytest.mark.parametrize("frozen", [0, 1])
def test_only_wanted_gradients_are_made(frozen):
    drawn = inputs(12, 9, 4)
    expected = with_gradients(naive.vocab_loss, *drawn, 0.1)[4 + (1 - frozen)]
    drawn[frozen].requires_grad_(False)
    loss, *_ = vocab_loss(*drawn, 0.1)
    (gradient,) = torch.autograd.grad(loss, (drawn[1 - frozen],), torch.tensor(0.3))
    torch.testing.assert_close(gradient, expected)


def test_without_grad_only_losses(monkeypatch):
    def refuse(*_):
        raise AssertionError("a gradient was made in evaluation")

    drawn = inputs(12, 9, 4)
    expected = vocab_loss(*drawn, 0.1)
    monkeypatch.setattr(EagerSoftmax, "gradient_", refuse)
    with torch.no_grad():
        actual = vocab_loss(*drawn, 0.1)
    assert not actual[0].requires_grad
    for value, right in zip(actual, expected, strict=True):
        assert torch.equal(value, right)


def test_sums_carry_no_gradient():
    assert [x.requires_grad for x in vocab_loss(*inputs(5, 6, 2), 0.1)] == [True, False, False, False]


def test_a_second_backward_is_refused():
    loss, *_ = vocab_loss(*inputs(5, 6, 2), 0.1)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_label_outside_the_vocabulary_is_named():
    hidden, weight, labels = inputs(5, 6, 2)
    labels[3] = 6
    with pytest.raises(ValueError, match="label 6 is outside the vocabulary of 6"):
        vocab_loss(hidden, weight, labels, 0.1)


def test_shapes_that_do_not_fit_are_named():
    hidden, weight, labels = inputs(5, 6, 2)
    with pytest.raises(ValueError, match=r"hidden \(5, 2\), weight \(6, 2\) and labels \(4,\)"):
        vocab_loss(hidden, weight, labels[:4], 0.1)


def test_never_more_logits_than_a_chunk(monkeypatch):
    seen = []
    log_partition_of = EagerSoftmax.log_partition

    def watch(self, logits_CW):
        seen.append((tuple(logits_CW.shape), logits_CW.untyped_storage().nbytes()))
        return log_partition_of(self, logits_CW)

    monkeypatch.setattr(EagerSoftmax, "log_partition", watch)
    vocab_loss(*inputs(25, 6, 2), 0.1, chunk_tokens=10)
    assert [shape for shape, _ in seen] == [(10, 6), (10, 6), (5, 6)]
    assert {size for _, size in seen} == {10 * 6 * 4}


def test_chunks_by_device():
    hidden, weight = torch.empty(2048, 4, device="meta"), torch.empty(32, 4, device="meta")
    assert tokens_of_a_chunk(hidden, weight) == CPU_CHUNK_TOKENS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_and_compilable_softmax_agree(dtype):
    logits = (5 * torch.randn(6, 50)).to(dtype)
    slope = torch.randn(6)
    eager, first, second = EagerSoftmax(), logits.clone(), logits.clone()
    log_z = eager.log_partition(first)
    torch.testing.assert_close(log_partition(second), log_z)
    torch.testing.assert_close(log_z, logits.float().logsumexp(-1))
    eager.gradient_(first, log_z + 1, slope)
    softmax_gradient_(second, log_z + 1, slope)
    expected = (logits.float() - log_z[:, None] - 1).exp() * slope[:, None]
    torch.testing.assert_close(first, expected.to(dtype))
    torch.testing.assert_close(second, expected.to(dtype))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_softmax_equals_eager(dtype):
    compiled_partition, compiled_gradient = torch.compile(log_partition), torch.compile(softmax_gradient_)
    slope = torch.randn(8)
    buffer = torch.empty(8, 40, dtype=dtype)
    for tokens in (8, 5):  # the last chunk is smaller, and all are views of one buffer
        logits = buffer[:tokens].copy_(torch.randn(tokens, 40))
        expected, log_z = logits.clone(), log_partition(logits)
        torch.testing.assert_close(compiled_partition(logits), log_z)
        softmax_gradient_(expected, log_z, slope[:tokens])
        compiled_gradient(logits, log_z, slope[:tokens])
        torch.testing.assert_close(logits, expected)
