import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tide_mega.metrics.deciles import SLOTS, DecileLoss, NullWeight, SlotIndex

# Types 0..9 in deciles 0..9, type 10 dropped, type 11 unseen, type 12 in decile 0 as well.
BINS = torch.tensor([*range(10), -1, -2, 0], dtype=torch.int8)


def one_rank(_: Tensor) -> None:
    """The sum over one rank."""


def test_losses_land_in_the_slot_of_their_target() -> None:
    deciles = DecileLoss(BINS)
    deciles.update(torch.tensor([[1.0, 3.0, 5.0], [7.0, 2.0, 9.0]]), torch.tensor([[0, 12, 9], [10, 11, 4]]))
    result = deciles.reduce(one_rank)
    expected: dict[str, float | None] = dict.fromkeys(SLOTS)
    expected |= {"0": 2.0, "9": 5.0, "dropped": 7.0, "unseen": 2.0, "4": 9.0}
    assert result.loss_by_bin == expected
    assert result.count_by_bin == {
        slot: {"0": 2}.get(slot, int(expected[slot] is not None)) for slot in SLOTS
    }
    assert (result.loss, result.tokens) == (27 / 6, 6)
    assert (result.rare, result.mid, result.common) == (2.0, 9.0, 5.0)


def test_groups_weigh_tokens_not_bins() -> None:
    deciles = DecileLoss(BINS)
    deciles.update(torch.tensor([[8.0, 2.0, 2.0, 2.0, 1.0, 4.0]]), torch.tensor([[0, 1, 1, 1, 3, 7]]))
    result = deciles.reduce(one_rank)
    assert (result.rare, result.mid, result.common) == (14 / 4, 1.0, 4.0)


def test_padding_is_left_out_even_where_its_loss_is_not_finite() -> None:
    deciles = DecileLoss(BINS)
    deciles.update(torch.tensor([[1.5, math.nan, math.inf]]), torch.tensor([[3, -1, -100]]))
    result = deciles.reduce(one_rank)
    assert (result.loss, result.tokens) == (1.5, 1)


def test_a_diverged_loss_stays_in_its_slot() -> None:
    deciles = DecileLoss(BINS)
    deciles.update(torch.tensor([[math.inf, 2.0]]), torch.tensor([[0, 5]]))
    result = deciles.reduce(one_rank)
    assert result.loss_by_bin["0"] == math.inf
    assert result.loss_by_bin["5"] == 2.0
    assert result.loss_by_bin["1"] is None


def test_without_tokens_there_is_no_loss() -> None:
    result = DecileLoss(BINS).reduce(one_rank)
    assert (result.loss, result.tokens, result.rare, result.mid, result.common) == (None, 0, None, None, None)
    assert set(result.loss_by_bin.values()) == {None}


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), batches=st.integers(1, 4))
def test_slots_add_up_to_the_total_exactly(seed: int, batches: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bins = torch.randint(-2, 10, (50,), generator=generator).to(torch.int8)
    deciles = DecileLoss(bins)
    total, tokens = 0.0, 0
    for _ in range(batches):
        # Multiples of 2^-20: every partial sum is exact in float64, so the identity is exact too.
        loss_BT = torch.randint(0, 2**24, (3, 7), generator=generator).to(torch.float32) * 2**-20
        labels_BT = torch.randint(-3, 50, (3, 7), generator=generator)
        deciles.update(loss_BT, labels_BT)
        total += loss_BT[labels_BT >= 0].double().sum().item()
        tokens += int((labels_BT >= 0).sum())
    sum_S, count_S = deciles.reduced(one_rank)
    assert sum_S.sum().item() == total
    assert deciles.reduce(one_rank).tokens == int(count_S.sum()) == tokens
    if tokens:
        assert deciles.reduce(one_rank).loss == total / tokens


def test_sums_of_ranks_are_those_of_one_process() -> None:
    torch.manual_seed(0)
    loss_BT, labels_BT = torch.rand(4, 9), torch.randint(-1, 13, (4, 9))
    whole, first, second = DecileLoss(BINS), DecileLoss(BINS), DecileLoss(BINS)
    whole.update(loss_BT, labels_BT)
    first.update(loss_BT[:2], labels_BT[:2])
    second.update(loss_BT[2:], labels_BT[2:])
    others = iter([second.sum, second.count])
    merged, expected = first.reduce(lambda tensor: tensor.add_(next(others))), whole.reduce(one_rank)
    assert merged.count_by_bin == expected.count_by_bin
    for slot, loss in expected.loss_by_bin.items():
        assert merged.loss_by_bin[slot] == (None if loss is None else pytest.approx(loss, rel=1e-14))
    assert first.reduce(one_rank).tokens == int((labels_BT[:2] >= 0).sum()), (
        "reduce must leave the sums alone"
    )


def test_reset_starts_again() -> None:
    deciles = DecileLoss(BINS)
    deciles.update(torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.int64))
    deciles.reset()
    assert deciles.reduce(one_rank).tokens == 0


def test_shapes_that_do_not_match_are_named() -> None:
    with pytest.raises(ValueError, match=r"loss_BT has shape \(1, 2\) but labels_BT has \(2, 1\)"):
        DecileLoss(BINS).update(torch.ones(1, 2), torch.zeros(2, 1, dtype=torch.int64))


@pytest.mark.parametrize("wrong", [10, -3])
def test_a_lookup_with_another_code_is_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match=rf"bin_of_type\[1\] is {wrong}"):
        SlotIndex(torch.tensor([0, wrong, 3], dtype=torch.int8))


def null_weights(tokens_BT: Tensor) -> Tensor:
    """[2, B, T]: layer 0 says token / 16, layer 1 half of that; exact in binary."""
    layer_BT = tokens_BT.clamp(min=0).to(torch.float32) / 16
    return torch.stack([layer_BT, layer_BT / 2])


def test_null_weight_per_layer_and_decile_of_the_input() -> None:
    null = NullWeight(2, BINS)
    tokens_BT = torch.tensor([[0, 12, 12, 9], [10, 9, 11, 2]])
    null.update(null_weights(tokens_BT), tokens_BT)
    result = null.reduce(one_rank)
    assert result.by_layer == [65 / 16 / 8, 65 / 32 / 8]
    expected: dict[str, float | None] = dict.fromkeys(SLOTS)
    expected |= {"0": 0.5, "2": 2 / 16, "9": 9 / 16, "dropped": 10 / 16, "unseen": 11 / 16}
    half = {slot: None if weight is None else weight / 2 for slot, weight in expected.items()}
    assert result.by_layer_and_bin == [expected, half]
    assert result.last_by_bin == half
    mean = {slot: None if weight is None else weight * 0.75 for slot, weight in expected.items()}
    assert result.mean_by_bin == mean


def test_null_weight_leaves_padding_out() -> None:
    null = NullWeight(2, BINS)
    tokens_BT = torch.tensor([[4, 8, -1]])
    null_LBT = null_weights(tokens_BT)
    null_LBT[:, :, 1:] = math.nan
    null.update(null_LBT, tokens_BT, labels_BT=torch.tensor([[0, -1, 3]]))  # type 0 is a label too
    assert null.reduce(one_rank).by_layer == [0.25, 0.125]


def test_a_diverged_router_stays_in_its_layer_and_slot() -> None:
    null = NullWeight(2, BINS)
    tokens_BT = torch.tensor([[4, 8]])
    null_LBT = null_weights(tokens_BT)
    null_LBT[0, 0, 0] = math.nan
    null.update(null_LBT, tokens_BT)
    result = null.reduce(one_rank)
    first, second = result.by_layer_and_bin
    assert first["4"] is not None and math.isnan(first["4"])
    assert (first["8"], second["4"], second["8"]) == (0.5, 0.125, 0.25)
    assert result.by_layer[1] == 6 / 32


def test_null_weight_of_a_model_without_memory_is_empty() -> None:
    null = NullWeight(0, BINS)
    null.update(None, torch.zeros(1, 2, dtype=torch.int64))
    result = null.reduce(one_rank)
    assert (result.by_layer, result.by_layer_and_bin, result.mean_by_bin, result.last_by_bin) == (
        [],
        [],
        {},
        {},
    )


def test_null_weight_refuses_another_number_of_layers() -> None:
    with pytest.raises(
        ValueError, match=r"null_LBT has shape \(3, 1, 2\); layers and tokens make \(2, 1, 2\)"
    ):
        NullWeight(2, BINS).update(torch.zeros(3, 1, 2), torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="null_LBT has shape None"):
        NullWeight(2, BINS).update(None, torch.zeros(1, 2, dtype=torch.int64))
