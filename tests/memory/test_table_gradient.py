"""The gradient of owned rows, of which few are touched, against going through all of them.

Shapes: W rows, Q rows received, K blocks, D width.
"""

import pytest
import torch

from tide_mega.memory.owned import TableGradient
from tide_mega.memory.ranges import row_squares, sum_by_block

ROWS, BLOCKS, WIDTH = 40, 3, 5
READINGS = {
    "nothing": [],
    "nobody asks": [([], [0])],
    "one asker": [([2, 7, 39], [3])],
    "a row asked for twice": [([2, 7, 2, 5], [2, 2])],
    "several readings": [([2, 7], [1, 1]), ([2, 3, 2], [1, 2])],
    "most rows": [(list(range(0, 40, 2)) + list(range(1, 15)), [20, 14])],
}


def fill(name):
    """A gradient with a case's readings, and the same sums by hand."""
    generator = torch.Generator().manual_seed(3)
    gradient = TableGradient(torch.zeros(ROWS, BLOCKS, WIDTH), "cpu")
    expected = torch.zeros(ROWS, BLOCKS, WIDTH)
    for rows, counts in READINGS[name]:
        received = torch.randn(len(rows), BLOCKS, WIDTH, generator=generator)
        gradient.add(torch.tensor(rows, dtype=torch.int64), received, counts, 2)
        for row, value in zip(rows, received, strict=True):
            expected[row] += value / 2
    return gradient, expected


@pytest.mark.parametrize("name", READINGS)
def test_norms_scale_and_clearing_are_those_of_the_whole_table(name):
    gradient, expected = fill(name)
    assert torch.equal(gradient.sum_WKD, expected)
    _, squares_U = row_squares(expected.view(-1), 0, WIDTH)
    torch.testing.assert_close(
        gradient.square_norms(), sum_by_block(0, squares_U, BLOCKS), rtol=1e-14, atol=0
    )
    gradient.scale_(0.3)
    assert torch.equal(gradient.sum_WKD, expected * 0.3)
    gradient.clear()
    assert not gradient.sum_WKD.any()
    assert not gradient.square_norms().any()


@pytest.mark.parametrize("name", ["a row asked for twice", "one asker"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_is_in_the_norm_and_leaves_with_the_gradient(name, bad):
    gradient, _ = fill(name)
    gradient.sum_WKD[2, 1, 4] = bad
    finite = torch.isfinite(gradient.square_norms()).tolist()
    assert finite == [True, False, True]
    gradient.clear()
    assert not gradient.sum_WKD.any()


def test_the_next_step_measures_its_own_rows_alone():
    gradient, _ = fill("one asker")
    gradient.clear()
    gradient.add(torch.tensor([1]), torch.ones(1, BLOCKS, WIDTH), [1], 1)
    assert gradient.square_norms().tolist() == pytest.approx([WIDTH] * BLOCKS)
