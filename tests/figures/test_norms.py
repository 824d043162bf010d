from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tide_mega.data.frequency import DROPPED, UNSEEN
from tide_mega.lab.figures.analysis import Analysis, SkippedError
from tide_mega.lab.figures.kit import row_norms
from tide_mega.lab.figures.norms import (
    MOST_INTERVALS,
    Growth,
    RunNorms,
    decile_means,
    densities,
    describe_growth,
    draw_growth,
    draw_means,
    measure_norms,
    measure_order,
    measure_run,
    run,
)
from tide_mega.lab.figures.registry import AnalyzeOptions
from tide_mega.parallel.device import choose_device
from tide_mega.trained.run import StoredWeights, TrainedRun


def planted(V: int = 240) -> tuple[np.ndarray, np.ndarray]:
    """Norm b + 1 in decile b, 100 and 1000 outside."""
    bins_V = np.resize(np.array([*range(10), DROPPED, UNSEEN], np.int8), V)
    norm_V = np.where(bins_V == DROPPED, 100.0, np.where(bins_V == UNSEEN, 1000.0, bins_V + 1.0))
    return bins_V, norm_V


def test_row_norms_in_chunks_are_those_of_the_whole_table() -> None:
    _, norm_V = planted()
    table_VKD = (
        torch.nn.functional.normalize(torch.randn(240, 3, 16), dim=-1) * torch.tensor(norm_V)[:, None, None]
    )
    chunks = [(first, table_VKD[first : first + 7].float()) for first in range(0, 240, 7)]
    np.testing.assert_allclose(row_norms(chunks), np.repeat(norm_V[:, None], 3, 1), rtol=1e-6)
    np.testing.assert_allclose(row_norms([(f, rows[:, 0]) for f, rows in chunks]), norm_V, rtol=1e-6)


def test_types_outside_the_deciles_are_in_none() -> None:
    bins_V, norm_V = planted()
    slots = measure_norms(norm_V, bins_V)
    assert [slots[str(b)].mean for b in range(10)] == [b + 1.0 for b in range(10)]
    assert (slots["dropped"].mean, slots["unseen"].mean) == (100.0, 1000.0)
    assert all(of.std == 0.0 and of.types == 20 for of in slots.values())
    assert decile_means(norm_V, bins_V).tolist() == [b + 1.0 for b in range(10)]


def test_a_decile_without_types_has_no_mean() -> None:
    bins_V, norm_V = planted()
    bins_V[bins_V == 4] = 5
    assert measure_norms(norm_V, bins_V)["4"].mean is None
    means_F = decile_means(norm_V, bins_V)
    assert np.isnan(means_F[4]) and means_F[5] == 5.5
    assert measure_order(means_F).steps == 8


@pytest.mark.parametrize(
    ("values", "rises", "falls", "spearman", "verb"),
    [
        ([1, 2, 5, 9], 3, 0, 1.0, "rises monotonically"),
        ([9, 5, 2, 1], 0, 3, -1.0, "falls monotonically"),
        ([1, 3, 2, 4], 2, 1, 0.8, "neither rises nor falls monotonically"),
        ([1, 1, 2], 1, 0, 0.8660254, "neither rises nor falls monotonically"),
        ([3, 3, 3], 0, 0, None, "neither rises nor falls monotonically"),
        ([3], 0, 0, None, "neither rises nor falls monotonically"),
    ],
)
def test_order_of_known_sequences(
    values: list[float], rises: int, falls: int, spearman: float | None, verb: str
) -> None:
    order = measure_order(np.array(values, float))
    assert (order.rises, order.falls, order.verb) == (rises, falls, verb)
    assert order.spearman is None if spearman is None else order.spearman == pytest.approx(spearman)


def test_growth_is_per_unit_of_tokens_whatever_the_distance_of_checkpoints() -> None:
    tokens = (1_000_000, 3_000_000, 4_000_000)
    slope_F = np.linspace(-1, 2, 10)  # of the norm per million tokens
    growth = Growth(tokens, 1.0 + np.outer(np.array(tokens) / 1e6, slope_F))
    np.testing.assert_allclose(growth.rate_CF, [slope_F, slope_F])
    assert growth.unit_name == "million"
    large = Growth(tuple(1000 * n for n in tokens), growth.mean_CF)
    np.testing.assert_allclose(large.rate_CF, growth.rate_CF)
    assert large.unit_name == "billion"


def test_growth_refuses_checkpoints_out_of_order() -> None:
    with pytest.raises(ValueError, match="ascend"):
        Growth((2, 2), np.ones((2, 10)))


def test_thinned_growth_joins_intervals_and_keeps_both_ends() -> None:
    tokens = tuple(range(0, 210, 10))
    growth = Growth(tokens, np.random.default_rng(0).normal(size=(21, 10)))
    few = growth.thinned(4)
    assert few.tokens_C == (0, 50, 100, 150, 200)
    np.testing.assert_allclose(few.rate_CF[0], growth.rate_CF[:5].mean(0))
    assert growth.thinned(20) is growth


def test_densities_of_rare_and_common_lie_where_their_norms_do() -> None:
    bins_V, norm_V = planted()
    edges, density = densities(norm_V, bins_V)
    assert (edges[0], edges[-1]) == (1.0, 10.0)
    for role, low, high in (("rare", 1.0, 3.0), ("common", 8.0, 10.0)):
        mass = density[role] * np.diff(edges)
        assert mass.sum() == pytest.approx(1.0)
        assert mass[(edges[1:] < low) | (edges[:-1] > high)].sum() == 0


def run_norms(label: str, K: int, checkpoints: int) -> RunNorms:
    bins_V, norm_V = planted()
    edges, density = densities(norm_V, bins_V)
    mean_F = decile_means(norm_V, bins_V)
    return RunNorms(
        label=label,
        num_blocks=K,
        embedding=measure_norms(norm_V, bins_V),
        order=measure_order(mean_F),
        tables_FK=np.outer(mean_F, np.arange(1, K + 1)) if K else None,
        edges=edges,
        density=density,
        growth=Growth(tuple(range(checkpoints)), np.outer(np.arange(checkpoints), mean_F)),
        initial=0.2,
    )


def test_figures_show_every_run_and_leave_no_panel_empty() -> None:
    runs = [run_norms("base", 0, 3), run_norms("k2", 2, 30), run_norms("k4", 4, 2), run_norms("k8", 8, 2)]
    embedding, tables = draw_means(runs).axes
    assert [line.get_label() for line in embedding.lines] == ["base", "k2", "k4", "k8"]
    assert list(embedding.lines[0].get_ydata()) == list(range(1, 11))
    np.testing.assert_allclose(tables.lines[0].get_ydata(), 1.5 * np.arange(1, 11))
    panels = [axis for axis in draw_growth(runs).axes if axis.get_title()]
    assert [len(axis.lines) for axis in panels] == [2 + 1, MOST_INTERVALS + 1, 1 + 1, 1 + 1]
    assert len(draw_means(runs[:1]).axes) == 1


def test_a_run_is_measured_at_every_checkpoint(tiny_runs: dict[int, Path]) -> None:
    trained = TrainedRun.open(tiny_runs[2])
    of = measure_run(trained)
    assert of.growth.tokens_C == (3 * 8 * 32, 6 * 8 * 32)
    for stored, mean_F in zip(trained.history, of.growth.mean_CF, strict=True):
        norm_V = stored.tensor("embedding.weight").norm(dim=1).numpy()
        for b in range(10):
            assert mean_F[b] == pytest.approx(norm_V[trained.bins == b].mean(), rel=1e-6)
    tables_VK = trained.weights.tensor("memory.tables").norm(dim=2).numpy()
    assert of.tables_FK is not None
    np.testing.assert_allclose(of.tables_FK[9], tables_VK[trained.bins == 9].mean(0), rtol=1e-6)


def growing(*tokens: int) -> RunNorms:
    """Mean norms that change by -3e-5 (rarest) to 6e-5 (commonest) per billion tokens, at last by twice that."""
    slope_F = np.linspace(-3e-5, 6e-5, 10)
    steps_C = np.diff(np.array(tokens) / 1e9)
    steps_C[1:] *= 2
    mean_CF = 1.0 + np.outer(np.concatenate([[0.0], np.cumsum(steps_C)]), slope_F)
    return replace(run_norms("big", 0, 2), growth=Growth(tokens, mean_CF))


def test_small_changes_keep_their_number_and_one_interval_is_told_once() -> None:
    assert describe_growth(growing(10**11, 2 * 10**11), 0, 9) == (
        "big: per billion tokens the rarest decile's mean norm changed by -3e-05 between the two checkpoints, "
        "the commonest's by +6e-05."
    )
    assert describe_growth(growing(10**11, 2 * 10**11, 3 * 10**11), 0, 9) == (
        "big: per billion tokens the rarest decile's mean norm changed by -3e-05 between the first two "
        "checkpoints and -6e-05 between the last two, the commonest's by +6e-05 and +0.00012."
    )


@pytest.mark.parametrize(
    ("name", "step", "place", "row"),
    [
        ("embedding.weight", 6, (4, 5), "row 4 of E"),
        ("embedding.weight", 3, (4, 5), "row 4 of E"),  # of the history
        ("memory.tables", 6, (7, 1, 5), "row 7 of E_2"),
    ],
)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_named(
    name: str,
    step: int,
    place: tuple[int, ...],
    row: str,
    wrong: float,
    tiny_runs: dict[int, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = StoredWeights.rows

    def spoilt(weights: StoredWeights, of: str, first: int, last: int) -> Tensor:
        rows = read(weights, of, first, last).clone()
        if (of, weights.step, first) == (name, step, 0):
            rows[place] = wrong
        return rows

    monkeypatch.setattr(StoredWeights, "rows", spoilt)
    with pytest.raises(SkippedError, match=f"the norm of {row} is not finite at step {step} of k2"):
        measure_run(TrainedRun.open(tiny_runs[2]))


def test_section_of_a_baseline_and_a_tide_run(tiny_runs: dict[int, Path]) -> None:
    early = tiny_runs[0] / "checkpoints" / "step-00000003"
    options = AnalyzeOptions(run=[f"base={early}", f"tide={tiny_runs[2]}"])
    section = run(Analysis.open(options, choose_device("cpu", 0)))
    assert len(section.tables["means"].rows) == 2 * 12
    assert len(section.tables["memory_tables"].rows) == 2 * 10
    assert {row[0] for row in section.tables["growth"].rows} == {"tide"}
    assert any("base: growth needs two checkpoints" in note for note in section.notes)
    assert sum(sentence.startswith("tide") for sentence in section.findings) == 3
