import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tide_mega.lab.figures import null_bound
from tide_mega.lab.figures.analysis import Analysis, SkippedError
from tide_mega.lab.figures.null_bound import Chunks, NullBound, RoutedMemory
from tide_mega.lab.figures.registry import AnalyzeOptions
from tide_mega.lab.plotting import line
from tide_mega.parallel.device import Device

K, D = 3, 8
EPS = 1e-6


def cut(rows_VKD: Tensor, size: int = 4) -> Chunks:
    return lambda: rows_VKD.split(size)


def random_rows(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(10, K, D, generator=generator), 0.5 + torch.rand(K, D, generator=generator)


def test_the_threshold_makes_the_bound_epsilon() -> None:
    assert null_bound.threshold(10.0, 4, 2.0) == pytest.approx(math.log(4 * 8 / 2))
    for epsilon in (5.0, 1e-3, 1e-9):
        s = null_bound.threshold(10.0, 4, epsilon)
        assert null_bound.bound(10.0, 4, s) == pytest.approx(epsilon, rel=1e-12)
    for epsilon in (0.0, -1.0, 10.0, 11.0):
        with pytest.raises(ValueError, match="is not between 0 and C = 10"):
            null_bound.threshold(10.0, 4, epsilon)


def test_the_largest_row_is_found_in_whichever_chunk_it_is() -> None:
    rows, gains = torch.ones(10, K, D), torch.ones(K, D)
    rows[:] *= 1e-3  # shorter than the norm's eps lets through
    rows[7, 2] = 5.0
    expected = math.sqrt(D) * 5 / math.sqrt(25 + EPS)
    for size in (1, 4, 10):
        assert null_bound.largest_row(cut(rows, size), gains, EPS) == pytest.approx(expected, rel=1e-6)


def test_rows_that_all_point_one_way_use_all_of_the_bound() -> None:
    rows = torch.ones(5, K, D)
    at, curve, epsilons = null_bound.check(cut(rows), torch.ones(K, D), EPS)
    assert at.largest_row == pytest.approx(math.sqrt(D), rel=1e-6)
    assert at.largest_memory == pytest.approx(epsilons, rel=1e-9)
    assert not at.violations
    assert not curve.violations


def test_rows_that_cancel_leave_nothing() -> None:
    rows = torch.ones(5, 2, D)
    rows[:, 1] = -1.0
    at, _, _ = null_bound.check(cut(rows), torch.ones(2, D), EPS)
    assert max(at.largest_memory) < 1e-6


def test_memory_is_that_of_the_softmax_whatever_the_chunks() -> None:
    rows, gains = random_rows()
    largest = null_bound.largest_row(cut(rows), gains, EPS)
    normed = rows / rows.square().mean(-1, keepdim=True).add(EPS).sqrt() * gains
    s = 1.25
    alpha = torch.tensor([0.0] * K + [s]).softmax(-1)[:K]
    expected = float(torch.einsum("k,vkd->vd", alpha, normed).norm(dim=-1).max())
    for size in (1, 3, 10):
        found = null_bound.measure_bound(cut(rows, size), gains, EPS, largest, [s])
        assert found.largest_memory == pytest.approx((expected,), rel=1e-5)
        assert not found.violations
        assert 0 < expected < found.bounds[0]


def test_a_claim_that_is_too_small_is_found() -> None:
    rows, gains = torch.ones(6, K, D), torch.ones(K, D)
    largest = null_bound.largest_row(cut(rows), gains, EPS)
    claimed = null_bound.measure_bound(cut(rows), 1.01 * gains, EPS, largest, [0.0, 3.0])
    assert claimed.violations == [0.0, 3.0]
    one_larger = gains.clone()
    one_larger[1] *= 1 + 1e-6
    assert null_bound.measure_bound(cut(rows), one_larger, EPS, largest, [3.0]).violations == [3.0]


def test_a_violation_reaches_the_findings() -> None:
    routed = RoutedMemory()
    routed.add(
        torch.full((1, 1, 1, 2), 0.5), torch.ones(1, 1, 1, D), torch.ones(1, 1, 1, D), largest_row=100.0
    )
    sound = NullBound(1, 1.0, (0.0,), (0.4,))
    broken = NullBound(1, 1.0, (0.0,), (0.6,))
    good = null_bound.describe(null_bound.Checked("run", sound, (0.5,), sound, routed))
    bad = null_bound.describe(null_bound.Checked("run", broken, (0.5,), sound, routed))
    assert "at most ε at the s* of every ε tried" in good[0]
    assert "the bound does NOT hold at null logits 0.00" in bad[0]
    curve = NullBound(1, 1.0, (-1.0, 2.0), (0.5, 0.2))
    bad = null_bound.describe(null_bound.Checked("run", sound, (0.5,), curve, routed))
    assert "the bound does NOT hold at null logits 2.00" in bad[0]
    bad = null_bound.describe(null_bound.Checked("run", broken, (0.5,), curve, routed))
    assert "the bound does NOT hold at null logits 0.00, 2.00" in bad[0]


@pytest.mark.parametrize("row", [0, 7, 9])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_named_in_whichever_chunk_it_is(row: int, wrong: float) -> None:
    rows, gains = random_rows()
    rows[row, 2, 1] = wrong
    for size in (1, 4, 10):
        with pytest.raises(SkippedError, match=f"row {row} of E_3 is not finite: look at an earlier"):
            null_bound.check(cut(rows, size), gains, EPS)


def test_a_gain_that_is_not_finite_is_named() -> None:
    rows, gains = random_rows()
    gains[1, 3] = math.nan
    with pytest.raises(SkippedError, match="the gain of E_2 is not finite"):
        null_bound.check(cut(rows), gains, EPS)


def test_memory_that_is_not_a_number_keeps_no_bound() -> None:
    assert NullBound(1, 1.0, (0.0, 1.0), (0.4, math.nan)).violations == [1.0]


@pytest.mark.parametrize(("spoilt", "place", "layer"), [(0, (1, 0, 1), 1), (1, (1, 0, 1), 1), (2, (0, 1), 0)])
def test_routed_memory_that_is_not_finite_is_named(spoilt: int, place: tuple[int, ...], layer: int) -> None:
    parts = [torch.full((2, 1, 3, 2), 0.5), torch.ones(2, 1, 3, D), torch.ones(1, 3, 1, D)]
    parts[spoilt][place] = math.nan
    with pytest.raises(SkippedError, match=f"memory or hidden states of layer {layer} are not finite"):
        RoutedMemory().add(*parts, largest_row=100.0)


def test_gains_of_0_have_nothing_to_silence() -> None:
    with pytest.raises(SkippedError, match="memory rows that are not 0"):
        null_bound.check(cut(torch.ones(3, K, D)), torch.zeros(K, D), EPS)


def test_routed_memory_is_the_weighted_sum_of_rows() -> None:
    alpha = torch.tensor([0.5, 0.25, 0.25]).expand(2, 1, 3, 3).clone()
    alpha[1] = torch.tensor([0.0, 0.0, 1.0])
    memory = torch.zeros(1, 3, 2, D)
    memory[..., 0, 0], memory[..., 1, 1] = 6.0, 16.0  # the mix is (3, 4, 0, ...)
    hidden = torch.zeros(2, 1, 3, D)
    hidden[..., 0] = 20.0
    routed = RoutedMemory()
    for _ in range(2):
        routed.add(alpha, hidden, memory, largest_row=16.0)
    assert routed.tokens == 6
    assert (routed.memory_L / 6).tolist() == pytest.approx([5.0, 0.0])
    assert (routed.part_L / 6).tolist() == pytest.approx([0.25, 0.0])
    assert routed.tightest == pytest.approx(5 / (0.75 * 16))
    assert routed.holds
    assert routed.null_logit(0, 2) == pytest.approx(math.log(2 * 0.25 / 0.75))
    assert routed.null_logit(1, 2) == math.inf
    routed.add(alpha, hidden, memory, largest_row=6.0)
    assert not routed.holds


def test_the_null_logit_gives_back_the_null_weight() -> None:
    logits = torch.tensor([0.0, 0.0, 0.0, 1.7], dtype=torch.float64)
    routed = RoutedMemory()
    rows = torch.ones(1, 1, 3, D)
    routed.add(logits.softmax(-1).expand(1, 1, 1, 4), torch.ones(1, 1, 1, D), rows, largest_row=3.0)
    assert routed.null_logit(0, 3) == pytest.approx(1.7)


def test_a_trained_run_keeps_the_bound(tiny_runs: dict[int, Path], alone: Device) -> None:
    options = AnalyzeOptions(
        run=[f"base={tiny_runs[0]}", f"again={tiny_runs[0]}", f"tide={tiny_runs[2]}"], sequences=4, batch=8
    )
    section = null_bound.run(Analysis.open(options, alone))
    table = section.tables["bound"]
    assert {row[table.columns.index("holds")] for row in table.rows} == {True}
    assert [row[0] for row in section.tables["layers"].rows] == ["tide", "tide"]
    assert "at the s* of every ε tried" in section.findings[0]
    assert "For no token and layer is the memory larger than" in section.findings[2]
    for axis in section.figures["null_bound"].axes:
        (of_run,) = (drawn for drawn in axis.lines if str(drawn.get_label()).startswith("tide"))
        assert of_run.get_color() == line(1).colour  # `again` has the look before
    assert any(f"watched on {4 * 32} held-out tokens" in note for note in section.notes)  # no padding
    with pytest.raises(SkippedError):
        null_bound.run(Analysis.open(AnalyzeOptions(run=[str(tiny_runs[0])]), alone))


def test_tokens_are_told_by_run_where_they_differ(
    tiny_runs: dict[int, Path], alone: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = AnalyzeOptions(run=[f"a={tiny_runs[2]}", f"b={tiny_runs[2]}"], sequences=4, batch=4)
    analysis = Analysis.open(options, alone)
    rows = analysis.held_out_rows(analysis.runs[0], 4)
    monkeypatch.setattr(analysis, "held_out_rows", lambda one, _: rows[:3] if one.label == "a" else rows[:1])
    assert any(
        "watched on a 96 held-out tokens, b 32 held-out tokens" in note
        for note in null_bound.run(analysis).notes
    )
