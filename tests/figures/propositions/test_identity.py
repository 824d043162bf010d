import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tide_mega.data.loader import IGNORE_LABEL, TokenBatch
from tide_mega.lab.figures import identity
from tide_mega.lab.figures.analysis import Analysis, SkippedError
from tide_mega.lab.figures.identity import ALLOWED, PairDistances, Seen, limit, reach_targets, rows_apart
from tide_mega.lab.figures.identity import separation as apart
from tide_mega.lab.figures.registry import AnalyzeOptions
from tide_mega.lab.plotting import line
from tide_mega.parallel.device import Device

EPS = 1e-5


def gains(K: int = 3, D: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(K, D, generator=torch.Generator().manual_seed(seed))


def test_the_limit_is_the_ellipsoids_longest_axis() -> None:
    assert limit(torch.tensor([[1.0, -3.0, 2.0, 0.0]])).tolist() == [2 * 2 * 3.0]


@pytest.mark.parametrize("D", [2, 16, 512])
def test_rows_are_as_far_apart_as_asked(D: int) -> None:
    of = gains(D=D)
    reached = reach_targets(of, EPS)
    assert reached.holds
    assert reached.deviation < ALLOWED
    assert torch.equal(reached.asked_NK[3], 0.5 * limit(of))


def test_distances_any_rows_have_can_be_made() -> None:
    of = gains(K=4, D=12, seed=3)
    generator = torch.Generator().manual_seed(1)
    u, v = (torch.randn(20, 4, 12, generator=generator) for _ in range(2))
    wanted = apart(u, v, of, EPS)
    assert bool((wanted < limit(of)).all())
    made = apart(*rows_apart(wanted, of, EPS), of, EPS)
    assert torch.allclose(made, wanted, rtol=1e-5)


def test_no_rows_reach_the_limit() -> None:
    of = gains()
    generator = torch.Generator().manual_seed(1)
    u = torch.randn(2_000, 3, 16, generator=generator)
    along = torch.nn.functional.one_hot(of.abs().argmax(1), 16)[None].float()
    rows = torch.cat([u, along])
    found = apart(rows, -rows, of, EPS)
    assert bool((found < limit(of)).all())
    assert torch.allclose(found[-1], limit(of), rtol=1e-3)  # opposite rows along the longest axis come close
    with pytest.raises(ValueError, match=r"from 0 to below 2 sqrt\(D\) max \|gain\|"):
        rows_apart(limit(of)[None], of, EPS)
    with pytest.raises(ValueError, match="from 0"):
        rows_apart(torch.full((1, 3), -0.1), of, EPS)
    with pytest.raises(ValueError, match="width 1"):
        rows_apart(torch.ones(1, 3), torch.ones(3, 1), EPS)


def test_distance_0_is_made_of_equal_rows() -> None:
    u, v = rows_apart(torch.zeros(1, 3), gains(), EPS)
    assert torch.allclose(u, v)


def seen(points_LND: torch.Tensor) -> Seen:
    return Seen(points_LND, 3 * points_LND, torch.zeros_like(points_LND))


# Types on the axes of a plane: 0 and 1 coincide but for 0.1.
PLANE = torch.tensor([[0.0, 0.0], [0.1, 0.0], [3.0, 4.0]])


def test_distances_are_those_of_the_planted_points() -> None:
    rows = torch.stack([PLANE, 10 * PLANE], dim=1)
    found = identity.measure_pairs([seen(PLANE[None]), seen(3 * PLANE[None])], rows, 0)
    assert found.pairs_P2.tolist() == [[0, 1], [0, 2], [1, 2]]
    third = math.hypot(2.9, 4)
    assert found.inputs_P == pytest.approx([0.2, 10.0, 2 * third])  # mean of 1 and 3 times the plane's
    assert found.outputs_P == pytest.approx([0.6, 30.0, 6 * third])
    assert found.injected_P.tolist() == [0, 0, 0]
    assert found.rows_PK == pytest.approx(np.array([[0.1, 1.0], [5.0, 50.0], [third, 10 * third]]))
    assert found.only(np.array([1])).pairs_P2.tolist() == [[0, 2]]


def test_the_collapsed_layer_is_found_whatever_its_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(3, 9, 8, generator=generator)
    spread[1] = 50 * (torch.ones(8) + 0.01 * spread[1])  # far out, and close together for that
    assert identity.closest_layer([seen(spread)]) == 1


def test_the_steepest_pair_is_that_of_one_context() -> None:
    outputs = 0.5 * PLANE
    moved = outputs.clone()
    moved[2, 0] += 4.0  # to (5.5, 2): from (0.05, 0) hypot(5.45, 2), where inputs are hypot(2.9, 4) apart
    contexts = [Seen(PLANE[None], of[None], torch.zeros(1, 3, 2)) for of in (outputs, moved)]
    assert identity.steepest(contexts, 0) == pytest.approx(math.hypot(5.45, 2) / math.hypot(2.9, 4))
    assert identity.steepest(contexts[:1], 0) == pytest.approx(0.5)


def test_types_that_coincide_have_no_slope() -> None:
    points = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [3.0, 0.0]]])
    assert identity.steepest([Seen(points, 2 * points, points)], 0) == pytest.approx(2.0)


def measured(closest_rows: float) -> identity.Measured:
    many = np.arange(1.0, 6.0)
    far = PairDistances(2, np.ones((5, 2), int), many, 2 * many, 3 * many, np.full((5, 2), 4.0))
    near = replace(far, inputs_P=many / 10, outputs_P=many / 5, rows_PK=np.full((5, 2), closest_rows))
    return identity.Measured("run", reach_targets(gains(), EPS), 9, 2, 15, 0.00123, near, far)


def test_findings_compare_closest_with_random_pairs() -> None:
    made, compared, slope = identity.describe(measured(3.0))
    assert "rows were found for all 18 distances asked for in 3 tables" in made
    assert "layer 2" in compared
    assert "feed-forward inputs 0.3 against 3 (10%), feed-forward outputs 0.6 against 6 (10%)" in compared
    assert "memory rows 3 against 4 (75%)" in compared
    assert slope == (
        "run, layer 2: over all 36 pairs of the types, in each of 2 contexts, feed-forward outputs are up to "
        "0.00123 times as far apart as their inputs; the closest pairs' memory rows are 3 to 3 apart."
    )
    one = measured(3.0)
    off = replace(one, reached=replace(one.reached, made_NK=1.001 * one.reached.asked_NK))
    assert "some were NOT made: they deviate by up to 1.0e-03" in identity.describe(off)[0]


def test_the_hooks_see_what_the_layers_add(tiny_runs: dict[int, Path], alone: Device) -> None:
    analysis = Analysis.open(AnalyzeOptions(run=[str(tiny_runs[2])], batch=2), alone)
    model = analysis.model(analysis.runs[0])
    context, ids = torch.tensor([5, 6, 7]), torch.tensor([3, 9, 11])
    found = identity.look(model, context, ids, batch=2)
    assert found.inputs_LND.shape == (2, 3, 32)
    tokens = torch.cat([context.expand(3, -1), ids[:, None]], dim=1)
    hidden = model.look_inside(tokens).hidden_LBTD[:, :, -1]
    with model.silenced(1):
        without = model.look_inside(tokens).hidden_LBTD[:, :, -1]
    assert torch.allclose(hidden[1] - without[1], found.injected_LND[1], atol=1e-5)
    mlp = model.stage.transformers[0].decoder.layers[1].mlp
    assert torch.allclose(mlp(found.inputs_LND[1][None])[0][0], found.outputs_LND[1], atol=1e-5)
    assert not mlp._forward_hooks


def test_trained_runs_are_measured(tiny_runs: dict[int, Path], alone: Device) -> None:
    options = AnalyzeOptions(
        run=[f"base={tiny_runs[0]}", f"again={tiny_runs[0]}", f"tide={tiny_runs[2]}"], sequences=4, batch=2
    )
    section = identity.run(Analysis.open(options, alone))
    assert "rows were found for all" in section.findings[0]
    table = section.tables["pairs"]
    inputs = table.columns.index("feed-forward inputs (l2)")
    nearest = [row[inputs] for row in table.rows if row[1] == "closest"]
    assert nearest == sorted(nearest, key=lambda value: float(value or 0))
    assert len({row[3:5] for row in table.rows if row[1] == "closest"}) > 1
    made, _ = section.figures["separation"].axes
    assert next(drawn for drawn in made.lines if drawn.get_label() == "tide").get_color() == line(1).colour
    assert any("after the same held-out contexts (2 of 15 tokens)" in note for note in section.notes)
    with pytest.raises(SkippedError):
        identity.run(Analysis.open(AnalyzeOptions(run=[str(tiny_runs[0])]), alone))


def test_padding_is_no_context(
    tiny_runs: dict[int, Path], alone: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    analysis = Analysis.open(AnalyzeOptions(run=[str(tiny_runs[2])], sequences=1, batch=1), alone)
    (run,) = analysis.runs
    (whole,) = analysis.held_out(run)
    expected = identity.measure(analysis, run)
    nothing = TokenBatch(torch.zeros_like(whole.tokens_BT), torch.full_like(whole.labels_BT, IGNORE_LABEL))
    padded = [TokenBatch(*map(torch.cat, zip(nothing, whole, nothing, strict=True))), nothing]
    monkeypatch.setattr(analysis, "held_out", lambda _: padded)
    found = identity.measure(analysis, run)
    assert found.contexts == expected.contexts == 1
    assert np.array_equal(found.closest.inputs_P, expected.closest.inputs_P)


def test_an_outlier_that_is_not_shown_is_in_the_finding(
    tiny_runs: dict[int, Path], alone: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    analysis = Analysis.open(AnalyzeOptions(run=[str(tiny_runs[2])], sequences=2, batch=2), alone)
    N = identity.TYPES
    inputs = torch.arange(float(N))[None, :, None].repeat(1, 1, 2) / math.sqrt(2)  # on a line, 1 apart
    inputs[0, -1] += 99 / math.sqrt(2)  # but for the last: 100 from the one before
    moved = 0.5 * inputs
    moved[0, -1] += 250 / math.sqrt(2)  # in one context, 300 from it instead of 50
    seen = iter([Seen(inputs, of, torch.zeros_like(inputs)) for of in (0.5 * inputs, moved)])
    monkeypatch.setattr(identity, "look", lambda *_: next(seen))
    monkeypatch.setattr(identity, "PAIRS", 20)
    found = identity.measure(analysis, analysis.runs[0])
    last = max(identity.types_of(analysis.runs[0], np.random.default_rng(analysis.options.seed)))
    shown = {tuple(pair) for of in (found.closest, found.random) for pair in of.pairs_P2.tolist()}
    assert not any(v == last for _, v in shown)
    assert found.steepest == pytest.approx(3.0)
    assert "over all 8,128 pairs of the types, in each of 2 contexts" in identity.describe(found)[2]
    assert "up to 3 times as far apart as their inputs" in identity.describe(found)[2]


def test_contexts_are_told_by_run_where_they_differ(
    tiny_runs: dict[int, Path], alone: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = AnalyzeOptions(run=[f"a={tiny_runs[2]}", f"b={tiny_runs[2]}"], sequences=2, batch=2)
    analysis = Analysis.open(options, alone)
    rows = analysis.held_out_rows(analysis.runs[0], 2)
    monkeypatch.setattr(
        analysis, "held_out_rows", lambda one, _: rows if one.label == "a" else [rows[0][:12]]
    )
    section = identity.run(analysis)
    assert any("contexts (a 2 of 15 tokens, b 1 of 12 tokens)" in note for note in section.notes)
    assert "b, layer" in section.findings[5]
    assert "pairs of the types, in 1 context, feed-forward" in section.findings[5]
