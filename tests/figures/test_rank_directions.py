"""Truncation to a rank, against torch's singular value decomposition and cases known by hand."""

import pytest
import torch

from tide_mega.lab.figures.rank import Directions, factor_elements, largest_that_saves, rank_of


def matrices(seed=0, shape=(90, 3, 12)):
    generator = torch.Generator().manual_seed(seed)
    # Columns of very different size, so that the order of the directions matters.
    return torch.randn(shape, generator=generator) * torch.logspace(0, -3, shape[-1])


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_a_cut_is_the_nearest_matrix_of_the_rank(rank):
    rows_NAC = matrices()
    cut_NAC = Directions.of(rows_NAC.split(40)).cut(rows_NAC, rank)
    for a in range(3):
        u, s, vh = torch.linalg.svd(rows_NAC[:, a].double(), full_matrices=False)
        expected = (u[:, :rank] * s[:rank]) @ vh[:rank]
        torch.testing.assert_close(cut_NAC[:, a].double(), expected, rtol=0, atol=3e-6)
        assert torch.linalg.matrix_rank(cut_NAC[:, a], rtol=1e-5) == rank


def test_rows_are_cut_alone_as_together_and_a_full_rank_changes_nothing():
    rows_NAC = matrices()
    directions = Directions.of([rows_NAC])
    torch.testing.assert_close(directions.cut(rows_NAC[7:9], 4), directions.cut(rows_NAC, 4)[7:9])
    torch.testing.assert_close(directions.cut(rows_NAC, 12), rows_NAC, rtol=0, atol=2e-6)


def test_a_matrix_of_rank_2_loses_nothing_at_rank_2():
    generator = torch.Generator().manual_seed(1)
    rows_NAC = (torch.randn(30, 2, generator=generator) @ torch.randn(2, 8, generator=generator))[:, None]
    directions = Directions.of([rows_NAC])
    torch.testing.assert_close(directions.cut(rows_NAC, 2), rows_NAC, rtol=0, atol=1e-5)
    assert directions.kept(2) == pytest.approx(1) and directions.kept(1) < 0.999


def test_what_is_kept_is_the_share_of_the_squared_norm():
    rows_NAC = matrices()
    directions = Directions.of([rows_NAC])
    left = directions.cut(rows_NAC, 3).double().square().sum() / rows_NAC.double().square().sum()
    assert directions.kept(3) == pytest.approx(float(left), rel=1e-5)


def test_no_rows_have_no_directions():
    with pytest.raises(ValueError, match="without rows"):
        Directions.of([])


@pytest.mark.parametrize(("percent", "rank"), [(0, 2048), (10, 1844), (30, 1434), (40, 1229), (60, 820)])
def test_ranks_are_the_papers(percent, rank):
    assert rank_of(percent, 2048) == rank


def test_it_saves_from_the_papers_rank_on():
    assert largest_that_saves(128_256, 2048) == 2015
    assert factor_elements(128_256, 2048, 2015) <= 128_256 * 2048 < factor_elements(128_256, 2048, 2016)
