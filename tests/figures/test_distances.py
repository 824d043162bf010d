from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tide_mega.data.frequency import DROPPED, UNSEEN
from tide_mega.lab.figures.analysis import Analysis, SkippedError
from tide_mega.lab.figures.distances import (
    ALL,
    draw_heat_map,
    draw_to_embedding,
    groups_of,
    measure_distances,
    run,
)
from tide_mega.lab.figures.kit import file_names, side_by_side, to_unit
from tide_mega.lab.figures.registry import AnalyzeOptions
from tide_mega.parallel.device import choose_device
from tide_mega.trained.run import TrainedRun

V, D = 60, 8
BINS = np.resize(np.array([*range(10), DROPPED, UNSEEN], np.int8), V)


def in_chunks(rows_VAD: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    for first in range(0, len(rows_VAD), size):
        yield first, rows_VAD[first : first + size].clone()


def planted() -> Tensor:
    """E; the same, scaled; its opposite; a right angle to it; 60 degrees to it."""
    plane = torch.linalg.qr(torch.randn(V, D, 2)).Q
    one, other = plane[..., 0], plane[..., 1]
    scale = torch.rand(V, 1) * 10 + 0.1
    return torch.stack((one, scale * one, -one, scale * other, one / 2 + 0.75**0.5 * other), dim=1)


@pytest.mark.parametrize("size", [1, 7, V])
def test_planted_cosines_come_out(size: int) -> None:
    found = measure_distances(in_chunks(planted(), size), groups_of(BINS))
    for group in found.types:
        np.testing.assert_allclose(found.mean_AA[group][0], [0, 0, 2, 1, 0.5], atol=1e-6)
        np.testing.assert_allclose(found.mean_AA[group][3, 4], 1 - 0.75**0.5, atol=1e-6)
        np.testing.assert_allclose(found.mean_AA[group], found.mean_AA[group].T, atol=1e-6)
    assert found.zeros_A == (0,) * 5


def test_groups_are_means_over_their_own_types() -> None:
    angle_V = torch.linspace(0, np.pi, V)
    rows_VAD = torch.zeros(V, 2, D)
    rows_VAD[:, 0, 0] = 3.0
    rows_VAD[:, 1, 0], rows_VAD[:, 1, 1] = angle_V.cos(), angle_V.sin()
    found = measure_distances(in_chunks(rows_VAD, 13), groups_of(BINS))
    distance_V = 1 - angle_V.cos().numpy()
    for group, first, last in (("rare", 0, 2), ("mid", 3, 6), ("common", 7, 9)):
        kept = (first <= BINS) & (last >= BINS)
        assert found.types[group] == kept.sum()
        assert found.mean_AA[group][0, 1] == pytest.approx(distance_V[kept].mean(), abs=1e-6)
    assert found.mean_AA["unseen"][0, 1] == pytest.approx(distance_V[BINS == UNSEEN].mean(), abs=1e-6)
    assert found.mean_AA[ALL][0, 1] == pytest.approx(distance_V[BINS != UNSEEN].mean(), abs=1e-6)


def test_rows_of_zeros_are_counted_and_have_cosine_0() -> None:
    rows_VAD = planted()[:, :2]
    rows_VAD[:6, 1] = 0
    everyone = {"all": np.arange(V)}
    found = measure_distances(in_chunks(rows_VAD, 4), everyone)
    assert found.zeros_A == (0, 6)
    assert found.mean_AA["all"][0, 1] == pytest.approx(6 / V, abs=1e-6)
    assert found.mean_AA["all"][1, 1] == 0


def test_tiny_and_huge_rows_keep_their_direction() -> None:
    rows_VAD = planted()
    rows_VAD[:, 1] *= 1e-30
    rows_VAD[:, 2] *= 1e30
    found = measure_distances(in_chunks(rows_VAD, V), groups_of(BINS))
    np.testing.assert_allclose(found.mean_AA[ALL][0], [0, 0, 2, 1, 0.5], atol=1e-6)
    assert found.zeros_A == (0,) * 5


def test_a_group_without_types_has_no_distance() -> None:
    found = measure_distances(in_chunks(planted(), 9), {"none": np.array([], int), "all": np.arange(V)})
    assert found.types["none"] == 0 and np.isnan(found.mean_AA["none"]).all()
    assert np.isfinite(found.mean_AA["all"]).all()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_named(wrong: float) -> None:
    rows_VAD = planted()
    rows_VAD[23, 2, 5] = wrong
    with pytest.raises(SkippedError, match="row 23 of E_2 is not finite"):
        measure_distances(in_chunks(rows_VAD, 10), groups_of(BINS))


def test_unit_rows_have_norm_1() -> None:
    rows = to_unit(torch.randn(5, 3, 4) * 1e3, range(5))
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(5, 3))


def test_heat_map_of_24_blocks_writes_every_number() -> None:
    found = measure_distances([(0, torch.randn(V, 25, D))], groups_of(BINS))
    axis = draw_heat_map("tide", found.mean_AA[ALL]).axes[0]
    assert len(axis.texts) == 25 * 25
    assert axis.texts[1].get_text() == f"{found.mean_AA[ALL][0, 1]:.2f}"
    panels = draw_to_embedding({f"run {i}": found for i in range(4)}).axes
    assert len(panels) == 4 and all(len(panel.lines) == 3 for panel in panels)


def test_tables_of_a_checkpoint_stand_side_by_side(
    tiny_runs: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = TrainedRun.open(tiny_runs[2]).weights
    monkeypatch.setattr("tide_mega.trained.run.CHUNK_ELEMENTS", 100 * 64)
    chunks = list(side_by_side(weights))
    assert [first for first, _ in chunks] == list(range(0, 640, 100))
    rows_VAD = torch.cat([rows for _, rows in chunks])
    assert torch.equal(rows_VAD[:, 0], weights.tensor("embedding.weight"))
    assert torch.equal(rows_VAD[:, 1:], weights.tensor("memory.tables"))


def test_section_compares_all_pairs_of_a_run(tiny_runs: dict[int, Path]) -> None:
    options = AnalyzeOptions(run=[f"base={tiny_runs[0]}", f"tide 1={tiny_runs[2]}"])
    section = run(Analysis.open(options, choose_device("cpu", 0)))
    trained = TrainedRun.open(tiny_runs[2])
    E, E_1 = trained.weights.tensor("embedding.weight"), trained.weights.tensor("memory.tables")[:, 0]
    kept = torch.from_numpy(trained.counts > 0)
    expected = 1 - torch.cosine_similarity(E, E_1)[kept].double().mean()
    pairs = section.tables["pairs"].rows
    assert [row[1:3] for row in pairs] == [("E", "E_1"), ("E", "E_2"), ("E_1", "E_2")]
    assert pairs[0][3] == int(kept.sum())
    assert pairs[0][4] == pytest.approx(float(expected), abs=1e-6)
    assert set(section.figures) == {"heat_map_tide-1", "to_embedding"}


def test_without_memory_there_is_nothing_to_compare(tiny_runs: dict[int, Path]) -> None:
    with pytest.raises(SkippedError, match="K > 0"):
        run(Analysis.open(AnalyzeOptions(run=[str(tiny_runs[0])]), choose_device("cpu", 0)))


def test_file_names_of_alike_labels_differ() -> None:
    assert file_names(["a b", "a/b", "a-b-2"]) == {"a b": "a-b", "a/b": "a-b-2", "a-b-2": "a-b-2-2"}
