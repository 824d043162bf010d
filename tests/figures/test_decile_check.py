import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tide_mega.data.frequency import DROPPED, UNSEEN
from tide_mega.data.loader import IGNORE_LABEL, TokenBatch
from tide_mega.lab.figures.decile_comparison import DECILES, OUTSIDE, DecileRun
from tide_mega.lab.figures.deciles import check_sums, count_slots, describe_check, differing
from tide_mega.metrics.deciles import DecileLoss, DecileResult, NullWeightResult
from tide_mega.metrics.records import EvalRecord

BINS = torch.tensor([*range(10), DROPPED, UNSEEN], dtype=torch.int8)


def evaluated(result: DecileResult) -> DecileRun:
    record = EvalRecord.of(1, 10, result, NullWeightResult([], [], {}, {}))
    return DecileRun.from_record("run", vars(record))


def accumulated(loss_N: list[float], label_N: list[int]) -> DecileRun:
    deciles = DecileLoss(BINS)
    deciles.update(torch.tensor([loss_N], dtype=torch.float64), torch.tensor([label_N]))
    return evaluated(deciles.reduce(lambda _: None))


# Losses in quarters and 1, 2 or 4 tokens a slot, 32 in all: every mean is a float64 number itself.
EXACT = accumulated(
    [8.25, 7.5, 7.0, 6.75, 6.25, 5.5, 5.0, 4.5, 3.25, 3.0, 2.75, 2.5, 2.25, 2.0, 1.75, 1.5]
    + [0.25 * i for i in range(16)],
    [0, 1, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 9, 9] + [10] * 16,
)


def test_parts_add_up_exactly_where_every_mean_is_a_float() -> None:
    checks = {one.what: one for one in check_sums(EXACT)}
    total = 8.25 + 7.5 + 7.0 + 6.75 + 6.25 + 5.5 + 5.0 + 4.5 + 3.25 + 3.0 + 2.75 + 2.5 + 7.5 + 30.0
    assert checks["all"].recorded == total / 32
    assert checks["all"].tokens == 32
    assert checks["all"].difference == 0.0
    assert all(one.holds for one in checks.values())
    assert (checks["common"].tokens, checks["common"].recorded) == (6, (2.75 + 2.5 + 7.5) / 6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 30), st.integers(0, 11)), min_size=1, max_size=200))
def test_parts_add_up_but_for_the_rounding_of_the_means(tokens: list[tuple[float, int]]) -> None:
    run = accumulated([loss for loss, _ in tokens], [label for _, label in tokens])
    checks = check_sums(run)
    assert checks[0].what == "all"
    assert checks[0].tokens == len(tokens)
    for one in checks:
        assert one.holds
        assert abs(one.difference) <= 1e-12 * max(one.recorded, 1e-300)


@pytest.mark.parametrize("part", ["all", "rare", "mid", "common"])
def test_a_recorded_mean_that_is_off_is_found(part: str) -> None:
    name = "loss" if part == "all" else part
    off = replace(EXACT, **{name: getattr(EXACT, name) * (1 + 1e-13)})
    assert [one.what for one in check_sums(off) if not one.holds] == [part]


def test_one_token_in_the_wrong_slot_is_found() -> None:
    counts = EXACT.count_by_slot
    moved = replace(EXACT, count_by_slot={**counts, "0": counts["0"] + 1, "9": counts["9"] - 1})
    wrong = {one.what for one in check_sums(moved) if not one.holds}
    assert {"all", "rare"} <= wrong


def test_the_difference_is_rational_not_rounded() -> None:
    third = accumulated([1.0, 1.0, 2.0], [0, 0, 0])
    nudged = replace(third, loss=math.nextafter(third.loss or 0.0, 9.0))
    by_what = {one.what: one for one in check_sums(nudged)}
    recorded = Fraction(nudged.loss or 0.0)
    assert by_what["all"].difference == float(Fraction(third.loss or 0.0) - recorded) != 0.0
    assert by_what["all"].in_last_places == -1.0


def test_a_diverged_loss_is_not_checked() -> None:
    assert "all" not in {one.what for one in check_sums(accumulated([math.inf, 1.0], [0, 9]))}
    assert "common" in {one.what for one in check_sums(accumulated([math.nan, 1.0], [0, 9]))}


def test_labels_are_counted_by_slot_without_padding() -> None:
    labels = torch.tensor([[0, 0, 9, IGNORE_LABEL], [10, 11, 11, IGNORE_LABEL]])
    counted = count_slots([TokenBatch(labels, labels), TokenBatch(labels[:1], labels[:1])], BINS.numpy())
    assert counted == {**dict.fromkeys(DECILES + OUTSIDE, 0), "0": 4, "9": 2, "dropped": 1, "unseen": 2}
    assert differing(counted, counted) == {}
    assert differing({**counted, "9": 3}, counted) == {"9": (3, 2)}


def test_counting_takes_any_bins() -> None:
    labels = torch.arange(12).view(3, 4)
    assert set(count_slots([TokenBatch(labels, labels)], np.asarray(BINS)).values()) == {1}


def described(run: DecileRun) -> str:
    return describe_check(run, check_sums(run))


def test_only_the_groups_that_were_checked_are_said_to_add_up() -> None:
    assert described(EXACT).endswith("; the losses of rare, mid, common tokens add up likewise.")
    assert described(replace(EXACT, mid=None)).endswith(
        "; the losses of rare, common tokens add up likewise."
    )
    assert "likewise" not in described(replace(EXACT, rare=None, mid=math.nan, common=None))


def test_why_the_overall_loss_was_not_checked_is_said() -> None:
    assert described(replace(EXACT, loss=None)).startswith("run: no loss is recorded, so")
    assert described(replace(EXACT, loss=math.nan)).startswith("run: the loss is not finite, so")
    gap = replace(EXACT, loss_by_slot={**EXACT.loss_by_slot, "4": None})
    assert described(gap).startswith("run: the loss of a slot is missing or not finite, so")


def test_a_group_that_is_off_is_named_where_there_is_no_overall_loss() -> None:
    assert "do NOT add up: rare by" in described(replace(EXACT, loss=None, rare=1.0))
