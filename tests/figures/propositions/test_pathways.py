import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tide_mega.data.loader import IGNORE_LABEL, TokenBatch
from tide_mega.lab.figures import pathways
from tide_mega.lab.figures import pathways as gradient_sums
from tide_mega.lab.figures.analysis import Analysis, SkippedError
from tide_mega.lab.figures.pathways import GradientSums, by_decile
from tide_mega.lab.figures.registry import AnalyzeOptions
from tide_mega.lab.plotting import line
from tide_mega.parallel.device import Device
from tide_mega.trained.model import RowGradients

V, K, D = 6, 3, 4


def step(
    ids: list[int], counts: list[int], embedding: list[float], tables: list[list[float]]
) -> RowGradients:
    """Gradients with these norms; each along another axis."""

    def of(norms: Tensor) -> Tensor:
        return torch.zeros(*norms.shape, D).index_fill_(-1, torch.tensor([2]), 1.0) * norms[..., None]

    rows = of(torch.tensor(tables)) if tables else None
    return RowGradients(torch.tensor(ids), torch.tensor(counts), of(torch.tensor(embedding)), rows)


def planted() -> GradientSums:
    """Type 1 in two steps, type 4 in one; norms 1 to 4."""
    sums = GradientSums.zero(V, K)
    sums.add(step([1, 4], [2, 6], [0.5, 2.0], [[1.0, 2.0, 3.0], [2.0, 2.0, 2.0]]))
    sums.add(step([1], [8], [1.5], [[1.0, 4.0, 1.0]]))
    return sums


def test_squares_add_up_over_steps_and_tables() -> None:
    sums = planted()
    assert sums.tables_VK[1].tolist() == [2.0, 20.0, 10.0]
    assert sums.total_V.tolist() == [0, 32, 0, 0, 12, 0]
    assert sums.embedding_V[[1, 4]].tolist() == [2.5, 4.0]
    assert sums.steps_V.tolist() == [0, 2, 0, 0, 1, 0]
    assert sums.tokens_V.tolist() == [0, 10, 0, 0, 6, 0]
    assert (sums.steps, sums.step_tokens) == (2, [8, 8])


def test_bounds_and_pathways_have_known_values() -> None:
    sums = planted()
    assert sums.smallest_V[[1, 4]].tolist() == [6.0, 12.0]
    assert sums.bound_V.tolist() == [0, 3 * 2 * 1.0, 0, 0, 3 * 1 * 4.0, 0]
    assert sums.pathways_V[[1, 4]].tolist() == [32 / 20, 3.0]
    assert sums.below_bound() == 0


def test_a_sum_that_lost_a_table_is_below_the_bound() -> None:
    sums = planted()
    sums.weakest_V[1] = 16.0  # what every step and table had: 3 x 2 x 16 in all
    assert sums.below_bound() == 1
    sums.tables_VK[4] = torch.nan
    assert sums.below_bound() == 2, "gradients that are no numbers bear nothing out"


def test_gradients_of_0_are_counted() -> None:
    sums = planted()
    assert sums.zeros_V.sum() == 0
    sums.add(step([4], [8], [1.0], [[0.0, 1.0, 0.0]]))
    assert sums.zeros_V.tolist() == [0, 0, 0, 0, 2, 0]
    assert sums.bound_V[4] == 0
    measured = pathways.Measured("run", sums, [])
    assert (
        "2 of 12 rows, one for each table, step and token type, had a gradient of exactly 0"
        in (pathways.describe(measured, None)[0])
    )


def test_without_memory_there_is_the_embedding_alone() -> None:
    sums = GradientSums.zero(V, 0)
    sums.add(step([1], [4], [3.0], []))
    assert sums.embedding_V[1] == 9.0
    (row,) = by_decile(sums, np.array([-2, 0, 0, -1, 1, 1]), np.ones(V))
    assert (row.decile, row.types, row.embedding, row.total) == (0, 1, 9.0, 0.0)
    assert math.isnan(row.pathways)


def test_deciles_average_over_types_that_appeared() -> None:
    bins, counts = np.array([0, 0, 0, -1, 9, -2]), np.array([1, 3, 0, 4, 8, 0])
    rare, common = by_decile(planted(), bins, counts)
    assert (rare.decile, rare.types, rare.total, rare.smallest, rare.pathways) == (0, 1, 32.0, 6.0, 1.6)
    assert (common.decile, common.total, common.embedding, common.pathways) == (9, 12.0, 4.0, 3.0)
    assert rare.steps_seen == pytest.approx(2 / 3)
    kappas = [1 - (1 - f / 16) ** 8 for f in (1, 3, 0)]
    assert rare.steps_expected == pytest.approx(2 * sum(kappas) / 3)
    assert common.steps_expected == pytest.approx(2 * (1 - 0.5**8))


def test_each_step_is_expected_by_its_own_size() -> None:
    sums = planted()
    sums.add(step([1, 4], [1, 1], [1.0, 1.0], [[1.0] * K] * 2))
    _, common = by_decile(sums, np.array([0, 0, 0, -1, 9, -2]), np.array([1, 3, 0, 4, 8, 0]))
    assert common.steps_expected == pytest.approx(2 * (1 - 0.5**8) + (1 - 0.5**2))


class LargestFp64(TorchDispatchMode):
    """Keeps the most elements that an fp64 tensor had."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.dtype == torch.float64:
            self.most = max(self.most, made.numel())
        return made


def test_gradients_are_squared_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_sums, "PIECE", 3)
    generator = torch.Generator().manual_seed(0)
    U, width = 20, 50
    tables, embedding = (torch.randn(*of, width, generator=generator) for of in ((U, K), (U,)))
    sums = GradientSums.zero(U, K)
    with LargestFp64() as watched:
        sums.add(RowGradients(torch.arange(U), torch.ones(U), embedding, tables))
    assert torch.equal(sums.tables_VK, tables.double().square().sum(-1))
    assert torch.equal(sums.embedding_V, embedding.double().square().sum(-1))
    assert watched.most == 3 * K * width


def test_a_type_of_a_huge_corpus_is_still_expected() -> None:
    sums = planted()
    (rare, _) = by_decile(sums, np.array([-1, 0, -1, -1, 9, -1]), np.array([0, 1, 0, 0, 10**18, 0]))
    assert rare.steps_expected == pytest.approx(sum(sums.step_tokens) * 1e-18)


def test_tables_compare_with_both_embeddings() -> None:
    bins, counts = np.array([-1, 0, -1, -1, 9, -1]), np.ones(V)
    sums = planted()
    one = pathways.Measured("tide", sums, by_decile(sums, bins, counts))
    base_sums = GradientSums.zero(V + 2, 0)  # a vocabulary that is padded more
    base_sums.add(step([1, 4], [2, 6], [0.0, 0.0], []))
    base_sums.add(step([1], [8], [4.0], []))
    base = pathways.Measured(
        "base", base_sums, by_decile(base_sums, np.append(bins, [-1, -1]), np.ones(V + 2))
    )
    assert pathways.apart([one], base) == []
    table = pathways.decile_table([one], base)
    own, other = (table.columns.index(f"all tables / {of} embedding") for of in ("own", "baseline's"))
    assert [(row[own], row[other]) for row in table.rows] == [(32 / 2.5, 2.0), (3.0, None)]
    assert (
        "decile 0 12.8 times its own and 2 times base's, decile 9 3 times its own"
        in (pathways.describe(one, base)[-1])
    )
    of_tables = pathways.table_table([one])
    assert [row[2] for row in of_tables.rows] == [6.0, 24.0, 14.0]
    assert sum(row[3] for row in of_tables.rows if isinstance(row[3], float)) == pytest.approx(100)


@pytest.mark.parametrize(
    "others",
    [
        [([1, 4], [2, 6])],  # fewer steps
        [([1, 4], [2, 6]), ([1], [7])],  # a smaller one
        [([1, 4], [2, 6]), ([4], [8])],  # another text
    ],
)
def test_sums_over_other_steps_are_not_compared(others: list[tuple[list[int], list[int]]]) -> None:
    bins, counts = np.array([-1, 0, -1, -1, 9, -1]), np.ones(V)
    sums, base_sums = planted(), GradientSums.zero(V, 0)
    for ids, tokens in others:
        base_sums.add(step(ids, tokens, [1.0] * len(ids), []))
    one, base = (
        pathways.Measured(name, of, by_decile(of, bins, counts))
        for name, of in (("tide", sums), ("base", base_sums))
    )
    (note,) = pathways.apart([one], base)
    assert note.startswith("tide: the steps have other tokens")
    assert pathways.apart([one], None) == []
    table = pathways.decile_table([one], base)
    assert [row[table.columns.index("all tables / baseline's embedding")] for row in table.rows] == [
        None,
        None,
    ]
    assert "base" not in pathways.describe(one, base)[-1]
    named = [
        text
        for axis in pathways.draw([one], base, {"tide": line(0), "base": line(1)}).axes
        for text in axis.get_legend_handles_labels()[1]
    ]
    assert not [text for text in named if "base" in text]


def test_steps_are_told_by_run_where_they_differ() -> None:
    other = GradientSums.zero(V, K)
    for size in (4, 1_200):
        other.add(step([1], [size], [1.0], [[1.0] * K]))
    first, second = pathways.Measured("a", planted(), []), pathways.Measured("b", other, [])
    assert pathways.sizes_of([first, first]) == "2 of 8 tokens"
    assert pathways.sizes_of([first, second]) == "a 2 of 8 tokens, b 2 of 4 to 1,200 tokens"


def test_a_wrong_sum_reaches_the_findings() -> None:
    sums = planted()
    sums.weakest_V[4] = 100.0
    text = pathways.describe(pathways.Measured("run", sums, []), None)[0]
    assert "for 1 of 2 token types the total is LESS than the bound" in text


@pytest.mark.slow
def test_trained_runs_are_differentiated(tiny_runs: dict[int, Path], alone: Device) -> None:
    options = AnalyzeOptions(
        run=[f"base={tiny_runs[0]}", f"again={tiny_runs[0]}", f"tide={tiny_runs[2]}"], sequences=6, batch=2
    )
    analysis = Analysis.open(options, alone)
    section = pathways.run(analysis)
    assert "is at least K times that of the least table" in section.findings[0]
    table = section.tables["deciles"]
    of = table.columns.index("median pathways (1 to K)")
    assert all(1 <= row[of] <= 2 for row in table.rows if isinstance(row[of], float))
    assert len(section.figures["gradients"].axes) == 4
    steps = pathways.measure(analysis, analysis.with_memory[0]).sums
    assert steps.steps == 3
    labels = sum(int((batch.labels_BT >= 0).sum()) for batch in analysis.held_out(analysis.with_memory[0]))
    assert int(steps.tokens_V.sum()) == sum(steps.step_tokens) == labels
    named = {drawn.get_label(): drawn for drawn in section.figures["gradients"].axes[0].lines}
    assert named["tide, tables"].get_color() == line(1).colour  # `again` has the look before
    assert "base, embedding" in named
    with pytest.raises(SkippedError):
        pathways.run(Analysis.open(AnalyzeOptions(run=[str(tiny_runs[0])]), alone))


def test_padding_changes_nothing(
    tiny_runs: dict[int, Path], alone: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    analysis = Analysis.open(AnalyzeOptions(run=[str(tiny_runs[2])], sequences=4, batch=2), alone)
    (run,) = analysis.runs
    whole = analysis.held_out(run)
    assert all(bool((batch.labels_BT >= 0).all()) for batch in whole)
    expected = pathways.measure(analysis, run)
    part = TokenBatch(*(x_BT[:1].clone() for x_BT in whole[0]))
    part.tokens_BT[:, 20:], part.labels_BT[:, 20:] = 0, IGNORE_LABEL
    nothing = TokenBatch(torch.zeros_like(part.tokens_BT), torch.full_like(part.labels_BT, IGNORE_LABEL))
    padded = [TokenBatch(*map(torch.cat, zip(whole[0], part, nothing, strict=True))), nothing, whole[1], part]
    monkeypatch.setattr(analysis, "held_out", lambda _: padded)
    found = pathways.measure(analysis, run)
    assert found.sums.step_tokens == expected.sums.step_tokens == [64, 64]
    for name in ("tables_VK", "embedding_V", "weakest_V", "steps_V", "tokens_V", "zeros_V"):
        assert torch.equal(getattr(found.sums, name), getattr(expected.sums, name)), name
    assert found.deciles == expected.deciles
