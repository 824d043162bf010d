import dataclasses

import pytest
import torch

from tide_mega.lab.bench.measure import Stopwatch
from tide_mega.lab.bench.mix import (
    BASELINE,
    MixCase,
    exact_results,
    make_inputs,
    measure_mix,
    mix_floor_bytes,
    run_mix,
)

CPU = torch.device("cpu")
CASE = MixCase(tokens=37, width=12, blocks=3, layers=2, dtype="fp32", distribution="zipf", vocab=50)


@pytest.mark.parametrize("version", ["naive", "cpu"])
@pytest.mark.parametrize("distribution", ["zipf", "uniform", "one"])
def test_versions_make_the_baselines_results_from_the_same_inputs(version, distribution):
    case = dataclasses.replace(CASE, distribution=distribution)
    expected = run_mix(make_inputs(case, BASELINE, CPU), BASELINE, Stopwatch(CPU))
    found = run_mix(make_inputs(case, version, CPU), version, Stopwatch(CPU))
    exact = exact_results(make_inputs(case, version, CPU))
    torch.testing.assert_close(exact.grad_rows_UKD, expected.grad_rows_UKD)
    torch.testing.assert_close(found.out_ND, expected.out_ND)
    torch.testing.assert_close(found.grad_logits_NJ, expected.grad_logits_NJ)
    torch.testing.assert_close(found.grad_rows_UKD, expected.grad_rows_UKD)
    assert found.grad_rows_UKD.dtype == torch.float32 and found.grad_rows_UKD.abs().max() > 0


def test_every_region_is_marked_and_inputs_stay_as_they_are():
    inputs = make_inputs(CASE, "cpu", CPU)
    before = [tensor.detach().clone() for tensor in (*inputs.grad_ND, *inputs.residual_ND, inputs.rows_UKD)]
    watch = Stopwatch(CPU)
    watch.start()
    run_mix(inputs, "cpu", watch)
    assert list(watch.read()) == ["order", "forward", "backward", "row gradient"]
    for tensor, old in zip((*inputs.grad_ND, *inputs.residual_ND, inputs.rows_UKD), before, strict=True):
        assert torch.equal(tensor, old)


def test_floor_bytes_of_a_hand_case():
    # N = 10, D = 4, K = 2 (J = 3), U = 5, two layers, bf16
    found = mix_floor_bytes(tokens=10, width=4, blocks=2, rows=5, layers=2, element=2)
    hidden, board, banks = 10 * 4 * 2, 5 * 2 * 4 * 2, 10 * 3
    forward = banks * 2 + hidden + hidden + board + 10 * 4 + hidden + banks * 4
    backward = hidden + board + banks * 4 + 10 * 4 + banks * 2
    assert found == {
        "order": 10 * 8 + 10 * 4 + 10 * 4 + 5 * 4,
        "forward": 2 * forward,
        "backward": 2 * backward,
        "row gradient": 2 * (hidden + banks * 4) + 10 * 4 + 5 * 4 + 5 * 2 * 4 * 4,
    }


def test_measured_lines_are_consistent():
    base, fused = measure_mix(CASE, [BASELINE, "cpu"], CPU, repeats=3, bandwidth=1e9, peak_threads=None)
    assert (base["version"], base["times_faster"]) == (BASELINE, 1.0)
    totals = [line["seconds"]["total"]["median"] for line in (base, fused)]
    assert fused["times_faster"] == pytest.approx(totals[0] / totals[1])
    assert max(base["error"], fused["error"]) < 1e-5
    floor = fused["floor_seconds"]
    assert floor == {region: count / 1e9 for region, count in fused["floor_bytes"].items()}
    assert fused["of_floor"]["total"] == pytest.approx(sum(floor.values()) / totals[1])
    median = fused["seconds"]["row gradient"]["median"]
    assert fused["of_floor"]["row gradient"] == pytest.approx(floor["row gradient"] / median)
    # The baseline has no row gradient of its own: it is in the backward pass.
    both = floor["backward"] + floor["row gradient"]
    assert base["of_floor"]["backward"] == pytest.approx(both / base["seconds"]["backward"]["median"])
    assert "row gradient" not in base["of_floor"]
