import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tide_mega.metrics.deciles import GRAIN, SLOTS, DecileLoss, ExactDecileLoss, SlotIndex

BINS = torch.tensor([*range(10), -1, -2, 0], dtype=torch.int8)


def one_rank(_):
    """The sum over one rank."""


def drawn(seed, batches):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.rand(2, 7, generator=generator) * 12, torch.randint(-2, 13, (2, 7), generator=generator))
        for _ in range(batches)
    ]


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), batches=st.integers(1, 5), order=st.randoms())
def test_means_are_those_of_the_plain_sum_and_bits_do_not_depend_on_the_order(seed, batches, order):
    plain, exact, shuffled = DecileLoss(BINS), ExactDecileLoss(BINS), ExactDecileLoss(BINS)
    steps = drawn(seed, batches)
    for loss_BT, labels_BT in steps:
        plain.update(loss_BT, labels_BT)
        exact.update(loss_BT, labels_BT)
    order.shuffle(steps)
    for loss_BT, labels_BT in steps:
        flip = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
        shuffled.update(loss_BT[:, flip], labels_BT[:, flip])
    expected, found = plain.reduce(one_rank), exact.reduce(one_rank)
    assert found.count_by_bin == expected.count_by_bin
    for slot, loss in expected.loss_by_bin.items():
        assert found.loss_by_bin[slot] == (None if loss is None else pytest.approx(loss, abs=0.51 / GRAIN))
    assert exact.sum.tolist() == shuffled.sum.tolist()


def test_padding_counts_nowhere_whatever_its_loss():
    exact = ExactDecileLoss(BINS)
    exact.update(torch.tensor([[1.5, float("inf")]]), torch.tensor([[9, -1]]))
    assert (exact.reduce(one_rank).loss, exact.reduce(one_rank).tokens) == (1.5, 1)


def test_slots_name_every_kind_of_token():
    slots = SlotIndex(BINS).slots(torch.tensor([0, 9, 10, 11, 12, -1]))
    names = [(*SLOTS, "padding")[slot] for slot in slots.tolist()]
    assert names == ["0", "9", "dropped", "unseen", "0", "padding"]


def test_shapes_that_do_not_match_are_named():
    with pytest.raises(ValueError, match=r"loss_BT has shape \(1, 2\) but labels_BT has \(2, 1\)"):
        ExactDecileLoss(BINS).update(torch.ones(1, 2), torch.zeros(2, 1, dtype=torch.int64))
