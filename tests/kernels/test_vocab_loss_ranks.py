"""The chunked loss with the vocabulary split over processes against the naive one over all of it."""

import pytest
import torch
import torch.distributed as dist

from tide_mega.kernels.vocab_loss import naive, vocab_loss

TOKENS, VOCABULARY, WIDTH, Z_LOSS = 21, 14, 5, 0.05


def drawn(case):
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator)
    labels = torch.randint(-1, VOCABULARY, (TOKENS,), generator=generator)
    if case == "all labels on one rank":
        labels %= VOCABULARY // 2
    if case == "far apart":
        weight[: VOCABULARY // 2] += 40
    return hidden, weight, labels


def on_a_rank(case, chunk):
    """Return loss, cross entropy, z_square, count, summed hidden gradient and this rank's weight gradient."""
    hidden, weight, labels = drawn(case)
    group = dist.group.WORLD
    own = weight.chunk(group.size())[group.rank()].clone().requires_grad_()
    hidden.requires_grad_()
    loss, *sums = vocab_loss(hidden, own, labels, Z_LOSS, group, chunk_tokens=chunk)
    loss.backward()
    dist.all_reduce(hidden.grad)
    return [x.detach().numpy() for x in (loss, *sums, hidden.grad, own.grad)]


@pytest.mark.parametrize("chunk", [4, None])
@pytest.mark.parametrize("case", ["random", "all labels on one rank", "far apart"])
def test_a_split_vocabulary_gives_the_whole_ones_loss_and_gradients(pools, case, chunk):
    hidden, weight, labels = drawn(case)
    hidden.requires_grad_(), weight.requires_grad_()
    loss, *sums = naive.vocab_loss(hidden, weight, labels, Z_LOSS)
    loss.backward()
    for rank, results in enumerate(pools(2).run(on_a_rank, case, chunk)):
        expected = (loss.detach(), *sums, hidden.grad, weight.grad.chunk(2)[rank])
        for value, right in zip(results, expected, strict=True):
            torch.testing.assert_close(torch.as_tensor(value), right, rtol=2e-5, atol=1e-5)


def refused(label):
    hidden, weight, labels = drawn("random")
    labels[0] = label
    try:
        vocab_loss(hidden, weight.chunk(2)[dist.get_rank()], labels, Z_LOSS, dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return None


def test_only_a_label_that_no_rank_has_is_refused(pools):
    assert pools(2).run(refused, VOCABULARY - 1) == [None, None]
    for message in pools(2).run(refused, VOCABULARY):
        assert f"label {VOCABULARY} is outside the vocabulary of {VOCABULARY}" in message
