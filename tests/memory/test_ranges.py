"""Sums of squares over ranges that cut rows anywhere.

Shapes: W rows, K blocks, D width.
"""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tide_mega.memory import ranges
from tide_mega.memory.ranges import row_squares, sum_by_block


@st.composite
def cut_tables(draw):
    shape = tuple(draw(st.integers(1, most)) for most in (5, 4, 6))
    size = shape[0] * shape[1] * shape[2]
    cuts = sorted(draw(st.lists(st.integers(0, size), max_size=4)))
    return shape, [0, *cuts, size], draw(st.integers(0, 2**31))


@settings(deadline=None, max_examples=60)
@given(cut_tables())
def test_ranges_together_have_the_squares_of_the_whole(drawn):
    (rows, blocks, width), cuts, seed = drawn
    table_WKD = torch.randn(rows, blocks, width, generator=torch.Generator().manual_seed(seed))
    expected_WK = table_WKD.double().square().sum(2)
    by_row, by_block = torch.zeros(rows * blocks).double(), torch.zeros(blocks).double()
    for start, end in pairwise(cuts):
        first, squares = row_squares(table_WKD.flatten()[start:end], start, width)
        by_row[first : first + len(squares)] += squares
        by_block += sum_by_block(first, squares, blocks)
    torch.testing.assert_close(by_row.view(rows, blocks), expected_WK, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(by_block, expected_WK.sum(0), rtol=1e-6, atol=1e-12)


def test_a_range_within_one_row():
    first, squares = row_squares(torch.tensor([3.0, 4.0]), 9, 8)
    assert (first, squares.tolist()) == (1, [25.0])
    assert sum_by_block(first, squares, 3).tolist() == [0, 25, 0]


def test_bf16_is_widened_before_it_is_squared(monkeypatch):
    monkeypatch.setattr(ranges, "PIECE", 64)  # several pieces
    values = torch.randn(40, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    _, squares = row_squares(values.flatten(), 0, 32)
    torch.testing.assert_close(squares, values.double().square().sum(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_what_is_not_finite_shows_in_its_block_alone(bad):
    values = torch.ones(6, 4)
    values[4, 2] = bad
    found = sum_by_block(*row_squares(values.flatten(), 0, 4), 3)
    assert found.isfinite().tolist() == [True, False, True]
