import pytest
import torch
import torch.nn.functional as F

from tide_mega.kernels.vocab_loss import vocab_scores


def drawn(tokens=37, size=9, vocabulary=23, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(tokens, size, generator=generator)
    weight_VD = torch.randn(vocabulary, size, generator=generator)
    labels_N = torch.randint(-1, vocabulary, (tokens,), generator=generator)
    labels_N[::3] = (hidden_ND @ weight_VD.t()).argmax(-1)[::3]
    labels_N[1] = -1
    return hidden_ND, weight_VD, labels_N


def expected(hidden_ND, weight_VD, labels_N):
    logits_NV = hidden_ND @ weight_VD.t()
    cross_entropy_N = F.cross_entropy(logits_NV, labels_N, ignore_index=-1, reduction="none")
    return cross_entropy_N, (logits_NV.argmax(-1) == labels_N) & (labels_N >= 0)


@pytest.mark.parametrize("chunk", [1, 5, 36, 37, 100, None])
def test_cross_entropy_and_first_choice_whatever_the_chunks(chunk):
    inputs = drawn()
    cross_entropy_N, is_top_N = vocab_scores(*inputs, chunk_tokens=chunk)
    exact_N, first_N = expected(*inputs)
    torch.testing.assert_close(cross_entropy_N, exact_N)
    assert torch.equal(is_top_N, first_N)
    assert is_top_N.sum() >= 10 and not is_top_N.all()


def test_without_a_label_nothing_is_scored():
    hidden_ND, weight_VD, labels_N = drawn()
    cross_entropy_N, is_top_N = vocab_scores(hidden_ND, weight_VD, torch.full_like(labels_N, -1))
    assert not cross_entropy_N.any() and not is_top_N.any()


def test_a_label_outside_the_vocabulary_is_refused():
    hidden_ND, weight_VD, labels_N = drawn()
    labels_N[4] = 23
    with pytest.raises(ValueError, match="label 23 is outside the vocabulary of 23"):
        vocab_scores(hidden_ND, weight_VD, labels_N)


def scores_of_a_part(inputs):
    import torch.distributed as dist

    hidden_ND, weight_VD, labels_N = inputs
    own_WD = weight_VD.chunk(2)[dist.get_rank()]
    return vocab_scores(hidden_ND, own_WD, labels_N, dist.group.WORLD, chunk_tokens=8)


def test_parts_of_the_vocabulary_say_the_same(pools):
    inputs = drawn(vocabulary=24)
    exact_N, first_N = expected(*inputs)
    for cross_entropy_N, is_top_N in pools(2).run(scores_of_a_part, inputs):
        torch.testing.assert_close(cross_entropy_N, exact_N)
        assert torch.equal(is_top_N, first_N)
