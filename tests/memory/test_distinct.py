"""Distinct types counted on token streams whose answer is known."""

import numpy as np
import pytest

from tide_mega.errors import ConfigError, DataError
from tide_mega.memory.distinct import Sequences, measure


def cut(*rows):
    return Sequences.cut(np.concatenate([np.array(row) for row in rows]), len(rows[0]), vocab=64)


def test_types_are_counted_in_each_step():
    text = cut([1, 1, 2, 2], [2, 3, 3, 3], [5, 5, 5, 5], [5, 6, 7, 8])
    found = measure(text, 8, owners=1, vocab=64, order="contiguous")
    # three types in the first step, four in the second
    assert (found.steps, found.mean, found.most, found.seen_before) == (2, 3.5, 4, 0.0)


def test_types_seen_in_the_step_before_are_a_share_of_the_later_step():
    text = cut([1, 2, 3, 3], [3, 4, 4, 4], [4, 3, 9, 9])
    found = measure(text, 4, owners=1, vocab=64, order="contiguous")
    assert found.seen_before == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_a_single_step_has_none_before_and_a_tail_is_left_out():
    found = measure(Sequences.cut(np.array([7, 7, 8, 9, 1]), 4, 64), 4, owners=1, vocab=64)
    assert (found.steps, found.mean, found.seen_before) == (1, 3, None)


def test_the_busiest_owner_is_relative_to_the_mean():
    # ids 0, 1, 2, 4 of 8 rows: blocks of 4 give 3 and 1 rows; even and odd ids give 3 and 1
    assert measure(cut([0, 1, 2, 4]), 4, owners=2, vocab=8).skew_blocks == 1.5
    found = measure(cut([0, 1, 2, 3]), 4, owners=2, vocab=8)
    assert (found.skew_blocks, found.skew_cyclic) == (2.0, 1.0)


def test_shuffled_steps_share_no_sequence_and_differ_from_contiguous_ones():
    rows = [[i, i, i, i] for i in range(32)]
    found = measure(cut(*rows), 16, owners=1, vocab=64)
    assert (found.steps, found.mean, found.most, found.seen_before) == (8, 4, 4, 0)
    pairs = [[i // 4] * 4 for i in range(32)]
    assert measure(cut(*pairs), 16, owners=1, vocab=64, order="contiguous").mean == 1
    assert measure(cut(*pairs), 16, owners=1, vocab=64).mean > 1


def test_text_shorter_than_a_step_and_ids_beyond_the_tables_are_named():
    with pytest.raises(
        DataError, match="the text has 1 sequences of 4 tokens, fewer than the 2 of a step of 8"
    ):
        measure(cut([1, 2, 3, 4]), 8, owners=1, vocab=64)
    with pytest.raises(ConfigError, match=r"vocab=8 has no row for token id 8 of the text: give at least 9"):
        measure(cut([1, 2, 3, 8]), 4, owners=1, vocab=8)
