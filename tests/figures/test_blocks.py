import math
from pathlib import Path

import numpy as np
import pytest

from tide_mega.lab.figures import blocks
from tide_mega.lab.figures.analysis import Analysis, SkippedError
from tide_mega.lab.figures.decile_comparison import DECILES, OUTSIDE, DecileRun
from tide_mega.lab.figures.registry import AnalyzeOptions
from tide_mega.parallel.device import Device


def evaluation(rare: float | None, mid: float, common: float, label: str = "run") -> DecileRun:
    every = DECILES + OUTSIDE
    return DecileRun(
        label=label,
        step=1,
        tokens=10,
        loss=5.0,
        rare=rare,
        mid=mid,
        common=common,
        loss_by_slot=dict.fromkeys(every),
        count_by_slot=dict.fromkeys(every, 1),
        null_by_layer=[],
        null_mean_by_slot={},
        null_last_by_slot={},
    )


# The paper's numbers at both ends; K = 2 with 55 % of the rare gain.
RUNS = [
    (24, evaluation(6.250, 4.0, 2.925)),
    (0, evaluation(6.671, 4.5, 3.0)),
    (2, evaluation(6.671 - 0.55 * 0.421, 4.25, 2.96)),
]


def test_losses_stand_by_blocks_with_differences_and_shares() -> None:
    data = blocks.measure(RUNS)
    assert data.blocks == (0, 2, 24)
    assert data.losses["mid"] == (4.5, 4.25, 4.0)
    assert data.differences("rare") == pytest.approx([0.0, -0.55 * 0.421, -0.421])
    assert data.differences("common") == pytest.approx([0.0, -0.04, -0.075])
    assert data.shares() == pytest.approx([0.0, 0.55, 1.0])


def test_findings_have_the_papers_numbers() -> None:
    text = " ".join(blocks.describe(blocks.measure(RUNS)))
    assert "rare 6.671 to 6.250 nats (-0.421)" in text
    assert "common 3.000 to 2.925 nats (-0.075)" in text
    assert "The gain on rare tokens is 5.6 times that on common ones" in text
    assert "K = 2 55%" in text


def test_the_slope_is_that_of_a_planted_line() -> None:
    line = [(k, evaluation(7 - 0.03 * k, 5 - 0.02 * k, 3 - 0.01 * k)) for k in (0, 2, 4, 8, 16, 24)]
    data = blocks.measure(line)
    assert [data.slope(role) for role in blocks.ROLES] == pytest.approx([-0.03, -0.02, -0.01])
    assert "slope against K 3.0 times as steep" in " ".join(blocks.describe(data))


def test_runs_of_the_same_size_are_averaged() -> None:
    data = blocks.measure([(0, evaluation(8, 6, 4)), (4, evaluation(6, 5, 3)), (4, evaluation(7, 5, 2))])
    assert data.blocks == (0, 4)
    assert data.losses["rare"] == (8, 6.5)


def test_no_gain_gives_no_share() -> None:
    data = blocks.measure([(0, evaluation(6, 5, 4)), (2, evaluation(6.5, 5, 4)), (4, evaluation(6.25, 5, 4))])
    assert data.shares() is None
    assert "K = 4 gains nothing on rare tokens" in " ".join(blocks.describe(data))
    assert set(blocks.blocks_table(data).columns) >= {"memory blocks K", "rare loss (nats)"}
    assert len(blocks.draw(data).axes) == 2


def test_a_role_without_tokens_is_empty_in_the_table() -> None:
    data = blocks.measure([(0, evaluation(None, 5, 4)), (2, evaluation(None, 4, 4))])
    assert math.isnan(data.losses["rare"][0])
    table = blocks.blocks_table(data)
    assert [row[table.columns.index("rare loss (nats)")] for row in table.rows] == [None, None]
    assert "rare" not in blocks.describe(data)[0]


def test_panels_show_losses_differences_and_shares() -> None:
    losses, differences, shares = blocks.draw(blocks.measure(RUNS)).axes
    assert [line.get_label() for line in losses.lines] == ["rare", "mid", "common"]
    assert list(losses.lines[0].get_xdata()) == [0, 2, 24]
    assert np.allclose(differences.lines[2].get_ydata(), [0, -0.04, -0.075])
    assert np.allclose(shares.lines[0].get_ydata(), [0, 55, 100])
    assert len(blocks.draw(blocks.measure(RUNS[:2])).axes) == 2


def test_one_number_of_blocks_is_not_enough() -> None:
    with pytest.raises(SkippedError, match="at least two different numbers of memory blocks"):
        blocks.measure([RUNS[0], RUNS[0]])


def test_trained_runs_are_compared(tiny_runs: dict[int, Path], alone: Device) -> None:
    at = tiny_runs[2] / "checkpoints" / "step-00000003"
    analysis = Analysis.open(AnalyzeOptions(run=[f"base={tiny_runs[0]}", f"tide={at}"]), alone)
    section = blocks.run(analysis)
    assert [row[0] for row in section.tables["blocks"].rows] == [0, 2]
    assert [row[0] for row in section.tables["runs"].rows] == ["base", "tide"]
    assert any(note.startswith("CAUTION: the runs are not after the same number") for note in section.notes)
    with pytest.raises(SkippedError):
        blocks.run(Analysis.open(AnalyzeOptions(run=[str(tiny_runs[0])]), alone))


@pytest.mark.parametrize("end", [None, math.nan, math.inf])
def test_an_unknown_rare_loss_is_not_called_no_gain(end: float | None) -> None:
    data = blocks.measure([(0, evaluation(6, 5, 4)), (2, evaluation(5, 5, 4)), (4, evaluation(end, 4, 3))])
    text = " ".join(blocks.describe(data))
    assert "From K = 0 to K = 4 the loss goes: mid 5.000 to 4.000" in text
    assert "rare" not in text
    assert data.shares() is None


def test_a_baseline_that_diverged_has_no_gain_over_it() -> None:
    data = blocks.measure([(0, evaluation(math.inf, 5, 4)), (2, evaluation(5, 5, 4))])
    assert data.shares() is None


def test_nothing_known_at_both_ends_is_said() -> None:
    nothing = evaluation(None, math.nan, math.inf)
    data = blocks.measure([(0, evaluation(6, 5, 4)), (2, evaluation(5, 4, 3)), (4, nothing)])
    assert blocks.describe(data) == ["No group has a finite loss at both ends."]


def test_a_diverged_run_between_the_ends_is_skipped() -> None:
    line = [(k, evaluation(7 - 0.03 * k, 5 - 0.02 * k, 3 - 0.01 * k)) for k in (0, 2, 8, 16)]
    data = blocks.measure([*line, (4, evaluation(math.nan, math.inf, math.nan))])
    assert [data.slope(role) for role in blocks.ROLES] == pytest.approx([-0.03, -0.02, -0.01])
    text = " ".join(blocks.describe(data))
    assert "slope against K 3.0 times as steep" in text
    assert "there is: K = 2 12%, K = 8 50%." in text
    assert [row[-1] for row in blocks.blocks_table(data).rows] == pytest.approx([0, 12.5, None, 50, 100])
    shares = blocks.draw(data).axes[2]
    assert [text.get_text() for text in shares.texts] == ["0%", "12%", "50%", "100%"]
    assert list(shares.lines[0].get_xdata()) == [0, 2, 8, 16]


def test_without_a_finite_run_between_the_ends_no_share_is_named() -> None:
    data = blocks.measure([(0, evaluation(6, 5, 4)), (2, evaluation(None, 5, 4)), (4, evaluation(5, 4, 3))])
    assert not any("there is" in sentence for sentence in blocks.describe(data))


def test_fewer_than_two_finite_losses_have_no_slope() -> None:
    assert math.isnan(blocks.measure([(0, evaluation(None, 5, 4)), (2, evaluation(5, 4, 3))]).slope("rare"))
