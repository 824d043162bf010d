import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from tide_mega.lab.figures import curves
from tide_mega.lab.figures.analysis import Analysis, SkippedError
from tide_mega.lab.figures.curves import (
    Curve,
    difference,
    draw,
    held_out_difference,
    make_curve,
    reaches,
    read_curve,
    running_mean,
    token_unit,
)
from tide_mega.lab.figures.registry import AnalyzeOptions
from tide_mega.lab.plotting import line
from tide_mega.parallel.device import Device


def straight(label: str, k: int, start: float, end: float, lines: int = 11, last: int = 1_000) -> Curve:
    """Losses on a straight line of tokens from 0 to `last`."""
    tokens = np.linspace(0, last, lines).astype(int).tolist()
    losses = np.linspace(start, end, lines).tolist()
    return make_curve(label, k, dict(zip(tokens, losses, strict=True)), {last: end + 0.5})


BASE, TIDE = straight("base", 0, 8.0, 4.0), straight("tide", 4, 8.0, 3.0)


def test_a_straight_line_stays_itself_under_smoothing_but_at_its_end() -> None:
    values = np.linspace(3.0, -2.0, 50)
    smooth = running_mean(values, 7)
    assert np.allclose(smooth[:-3], values[:-3])
    assert smooth[-1] == pytest.approx(values[-4:].mean())
    assert np.array_equal(running_mean(values, 1), values)


def test_smoothing_averages_neighbours_and_fewer_at_the_ends() -> None:
    smooth = running_mean(np.array([1.0, 5.0, 0.0, 0.0, 10.0, 2.0]), 5)
    assert np.allclose(smooth, [1.0, 2.0, 3.2, 3.4, 3.0, 4.0])
    with pytest.raises(ValueError, match="odd number of values, not 4"):
        running_mean(np.zeros(3), 4)


def test_short_logs_are_not_smoothed_and_long_ones_are() -> None:
    assert BASE.window == 1
    assert straight("long", 0, 8.0, 4.0, lines=400).window == 11


def test_differences_are_interpolated_at_tokens_both_have() -> None:
    other = make_curve("other", 2, {-50: 9.0, 250: 6.0, 550: 5.0, 5_000: 1.0}, {})
    tokens, gaps = difference(other, BASE)
    assert tokens.tolist() == [250, 550]
    assert gaps == pytest.approx([6.0 - 7.0, 5.0 - 5.8])


def test_the_baselines_last_loss_is_reached_between_two_lines() -> None:
    assert reaches(TIDE, 4.0) == pytest.approx(800.0)
    assert reaches(TIDE, 2.9) is None
    assert reaches(TIDE, 9.0) == 0.0


def test_held_out_losses_are_compared_where_both_were_evaluated() -> None:
    a = make_curve("a", 0, {1: 1.0}, {10: 5.0, 20: 4.0})
    b = make_curve("b", 2, {1: 1.0}, {20: 3.5, 30: 3.0})
    assert held_out_difference(b, a) == {20: -0.5}


def test_findings_say_where_curves_end_and_meet() -> None:
    text = " ".join(curves.describe([BASE, TIDE, straight("more", 8, 8.0, 2.0)]))
    assert (
        "base ends at 4.000 nats of training loss after 1,000 tokens and 4.500 nats on held-out text" in text
    )
    assert "tide is below base at 91% of 11 token counts; the difference after 1,000 is -1.000 nats" in text
    assert "it has base's last training loss after 800 tokens, 80% of its" in text
    assert "after 1,000 tokens, the lowest first: more (K = 8) < tide (K = 4)." in text
    assert "does not reach base's last training loss" in " ".join(
        curves.describe([BASE, straight("worse", 2, 9.0, 5.0)])
    )


def test_a_run_that_starts_later_is_not_ordered() -> None:
    late = make_curve("late", 8, {2_000: 2.0, 3_000: 1.5}, {})
    assert not any("lowest first" in text for text in curves.describe([TIDE, late]))
    more = straight("more", 2, 8.0, 2.0)
    text = " ".join(curves.describe([more, TIDE, late]))
    assert "after 1,000 tokens, the lowest first: more (K = 2) < tide (K = 4)." in text


def test_milestones_are_at_tokens_all_runs_have() -> None:
    table = curves.milestones([BASE, straight("short", 4, 8.0, 6.0, last=500)])
    assert [row[0] for row in table.rows] == [50, 125, 250, 375, 450, 500]
    at_250 = table.rows[2]
    assert at_250[1:] == pytest.approx((7.0, 7.0, 0.0))
    assert table.columns == (
        "training tokens",
        "base loss (nats)",
        "short loss (nats)",
        "short minus base (nats)",
    )


def test_points_are_thinned_but_keep_the_last() -> None:
    long = straight("long", 0, 8.0, 4.0, lines=5_001, last=5_000_000)
    rows = [row for row in curves.points([long]).rows if row[1] == "training"]
    assert curves.MOST_POINTS / 2 < len(rows) <= curves.MOST_POINTS
    assert rows[-1][2:4] == (5_000_000, 4.0)


def write(path: Path, *records: dict[str, object], tail: str = "") -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return path


def test_a_log_with_restarts_torn_lines_and_diverged_losses_is_read(tmp_path: Path) -> None:
    def train(step: int, loss: object) -> dict[str, object]:
        return {"step": step, "kind": "train", "tokens": 10 * step, "loss": loss}

    path = write(
        tmp_path / "metrics.jsonl",
        train(1, 8.0),
        train(2, 7.0),
        train(2, 6.5),
        train(3, "NaN"),
        {"step": 3, "kind": "event", "tokens": 30, "loss": 1.0},
        {"step": 4, "kind": "eval", "tokens": 40, "loss": 6.0},
        train(4, 5.0),
        train(5, 4.0),
        tail='{"step": 6, "kind": "tr',
    )
    curve = read_curve(path, "run", 0, until=4)
    assert curve.tokens.tolist() == [10, 20, 40]
    assert curve.loss.tolist() == [8.0, 6.5, 5.0]
    assert curve.held_out == {40: 6.0}
    assert curve.left_out == 1


def test_the_figure_shows_both_panels_with_the_baseline_dashed() -> None:
    losses, gaps = draw([BASE, TIDE]).axes
    named = {line.get_label(): line for line in losses.lines if not str(line.get_label()).startswith("_")}
    assert set(named) == {"base", "tide"}
    assert named["base"].get_linestyle() == "--"
    assert np.allclose(gaps.lines[0].get_ydata(), np.linspace(0, -1, 11))
    assert "nats per token" in losses.get_ylabel()
    assert "nats per token" in gaps.get_ylabel()
    assert len(draw([TIDE]).axes) == 1


def test_the_steep_start_leaves_the_picture() -> None:
    late = {tokens: 4.0 - tokens / 1e4 for tokens in range(0, 1_001, 10)} | {0: 12.0, 10: 9.0}
    (axis,) = draw([make_curve("run", 0, late, {})]).axes
    assert axis.get_ylim()[1] < 5.0


def test_tokens_have_a_readable_unit() -> None:
    assert token_unit(2e11) == (1e9, "billions")
    assert token_unit(1.5e6) == (1e6, "millions")
    assert token_unit(12) == (1.0, "")


def test_trained_runs_are_drawn(tiny_runs: dict[int, Path], alone: Device, tmp_path: Path) -> None:
    options = AnalyzeOptions(run=[f"base={tiny_runs[0]}", f"tide={tiny_runs[2]}"])
    section = curves.run(Analysis.open(options, alone))
    of_tide = [row for row in section.tables["points"].rows if row[0] == "tide"]
    assert {row[1] for row in of_tide} == {"training", "held-out"}
    assert all(math.isfinite(row[3]) for row in of_tide if isinstance(row[3], float))
    assert len(section.tables["curves"].rows) == len(curves.SHARES)


def test_a_run_that_is_left_out_does_not_change_the_others_looks(
    tiny_runs: dict[int, Path], alone: Device, tmp_path: Path
) -> None:
    shutil.copytree(tiny_runs[2], tmp_path / "bare")
    (tmp_path / "bare" / "metrics.jsonl").unlink()
    runs = [f"base={tiny_runs[0]}", f"bare={tmp_path / 'bare'}", f"tide={tiny_runs[2]}"]
    section = curves.run(Analysis.open(AnalyzeOptions(run=runs), alone))
    for axis in section.figures["curves"].axes:
        (of_tide,) = [drawn for drawn in axis.lines if drawn.get_label() == "tide"]
        assert of_tide.get_color() == line(1).colour


def test_without_training_losses_it_says_what_it_needs(
    tiny_runs: dict[int, Path], alone: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    analysis = Analysis.open(AnalyzeOptions(run=[str(tiny_runs[0])]), alone)
    monkeypatch.setattr(type(analysis.runs[0]), "metrics", property(lambda _: Path("nowhere")))
    with pytest.raises(SkippedError, match=r"metrics\.jsonl that has training losses"):
        curves.run(analysis)
