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


def planted_ties():
    """Small whole numbers in bf16: logits are exact and often equal; also planted across the ranks' boundary."""
    generator = torch.Generator().manual_seed(3)
    hidden_ND = torch.randint(-2, 3, (60, 4), generator=generator).bfloat16()
    weight_VD = torch.randint(-1, 2, (24, 4), generator=generator).bfloat16()
    hidden_ND[:6] = torch.tensor([2.0, 0, 0, 0])
    weight_VD[:, 0] = weight_VD[:, 0].clamp(max=0)
    weight_VD[[7, 11, 12, 20], 0] = 4  # 11 | 12 is the boundary of two ranks
    logits_NV = hidden_ND @ weight_VD.t()
    labels_N = logits_NV.argmax(-1)
    labels_N[:6] = torch.tensor([7, 11, 12, 20, 0, 7])
    # From here on every second label is the last of the equals.
    last_N = 23 - logits_NV.flip(1).argmax(-1)
    labels_N[6::2] = last_N[6::2]
    return hidden_ND, weight_VD, labels_N


def test_of_equal_logits_the_lowest_id_is_the_first_choice_also_across_ranks(pools):
    inputs = hidden_ND, weight_VD, labels_N = planted_ties()
    logits_NV = hidden_ND @ weight_VD.t()
    first_N = logits_NV.argmax(-1) == labels_N
    is_tied_N = logits_NV.gather(1, labels_N[:, None]).squeeze(1) == logits_NV.amax(-1)
    assert first_N[:6].tolist() == [True, False, False, False, False, True]
    assert (is_tied_N & ~first_N).sum() > 5 and first_N.sum() > 20
    for _, is_top_N in [vocab_scores(*inputs), *pools(2).run(scores_of_a_part, inputs)]:
        assert torch.equal(is_top_N, first_N)


def test_a_model_that_says_the_same_of_all_tokens_chooses_the_first(pools):
    _, weight_VD, _ = drawn(vocabulary=24)
    inputs = torch.zeros(24, 9), weight_VD, torch.arange(24)
    for cross_entropy_N, is_top_N in [vocab_scores(*inputs), *pools(2).run(scores_of_a_part, inputs)]:
        assert is_top_N.nonzero().flatten().tolist() == [0]
        torch.testing.assert_close(cross_entropy_N, torch.full((24,), 24.0).log())


def test_nothing_is_the_first_choice_among_undefined_logits():
    hidden_ND, weight_VD, labels_N = drawn()
    _, is_top_N = vocab_scores(hidden_ND * torch.nan, weight_VD, labels_N)
    assert not is_top_N.any()
