from dataclasses import replace
from decimal import Decimal, localcontext
from pathlib import Path

import numpy as np
import pytest

from tide_mega.data.frequency import DROPPED, UNSEEN
from tide_mega.lab.figures.analysis import Analysis
from tide_mega.lab.figures.registry import AnalyzeOptions
from tide_mega.lab.figures.updates import (
    PAPER,
    PAPER_TABLE,
    Schedule,
    Setting,
    draw,
    expected_updates,
    measure_updates,
    run,
)
from tide_mega.parallel.device import choose_device

BINS = np.array([0, 0, 0, 9, DROPPED, UNSEEN], np.int8)


def by_decimals(f: float, steps: int, tokens_per_step: int) -> float:
    with localcontext() as context:
        context.prec = 60
        return float(steps * (1 - (1 - Decimal(f)) ** tokens_per_step))


@pytest.mark.parametrize("f", [1e-18, 8.3e-9, 1e-6, 1 / 16384, 8.3e-3, 0.5, 1 - 1e-12])
def test_equation_holds_to_full_precision_for_any_share(f: float) -> None:
    exact = by_decimals(f, 12_207_031, 16_384)
    assert float(expected_updates(f, Schedule(12_207_031, 16_384))) == pytest.approx(exact, rel=1e-13)


def test_a_token_that_never_occurs_gets_none_and_the_only_token_one_a_step() -> None:
    assert expected_updates([0.0, 1.0], Schedule(550, 2048)).tolist() == [0.0, 550.0]


def test_a_step_of_one_token_gets_f_updates() -> None:
    shares = np.random.default_rng(0).uniform(size=100)
    np.testing.assert_allclose(expected_updates(shares, Schedule(1, 1)), shares, rtol=1e-13)


@pytest.mark.parametrize("f", [-1e-9, 1.5, float("nan")])
def test_what_is_no_share_is_refused(f: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        expected_updates([0.5, f], PAPER)


def test_the_papers_table_comes_out_except_where_it_is_above_the_number_of_steps() -> None:
    for _, _, _, f, printed in PAPER_TABLE:
        assert float(expected_updates(f, PAPER)) == pytest.approx(min(printed, PAPER.steps), rel=0.01)


def test_summary_of_a_slot_is_that_of_its_own_types() -> None:
    counts = np.array([1, 2, 40, 957, 0, 0], np.uint64)
    slots = measure_updates(counts, BINS, Schedule(100, 10))
    each = [by_decimals(c / 1000, 100, 10) for c in (1, 2, 40)]
    rarest = slots["0"]
    assert (rarest.types, rarest.few) == (3, (1, 2, 3))
    np.testing.assert_allclose([rarest.least, rarest.median, rarest.greatest], each, rtol=1e-12)
    assert slots["9"].few == (0, 0, 1)
    assert slots["1"].median is None and slots["1"].types == 0
    assert slots["unseen"].greatest == 0 and slots["dropped"].types == 1


def test_text_without_a_token_is_refused() -> None:
    with pytest.raises(ValueError, match="no token"):
        measure_updates(np.zeros(6, np.uint64), BINS, PAPER)


def test_section_puts_runs_of_one_length_together(tiny_runs: dict[int, Path]) -> None:
    runs = [
        f"base={tiny_runs[0]}",
        f"tide={tiny_runs[2]}",
        f"half={tiny_runs[2] / 'checkpoints/step-00000003'}",
    ]
    section = run(Analysis.open(AnalyzeOptions(run=runs), choose_device("cpu", 0)))
    rows = section.tables["expected_updates"].rows
    settings = {row[0]: (row[1], row[2]) for row in rows}
    assert settings["base, tide"] == (6, 8 * 32) and settings["half"] == (3, 8 * 32)
    assert settings["the paper's budget on this text"] == (12_207_031, 16_384)
    assert all(row[8] <= row[1] + 1 for row in rows if isinstance(row[8], float) and isinstance(row[1], int))
    assert len(section.findings) == 3
    assert all(axis.get_yscale() == "log" for axis in section.figures["expected_updates"].axes)


def test_rows_that_pad_the_vocabulary_are_no_types_and_set_no_run_apart(tiny_runs: dict[int, Path]) -> None:
    options = AnalyzeOptions(run=[f"base={tiny_runs[0]}", f"tide={tiny_runs[2]}"])
    analysis = Analysis.open(options, choose_device("cpu", 0))
    base, tide = analysis.runs
    model = replace(tide.config.model, vocab_size=tide.config.model.vocab_size + 64)
    padded = replace(tide, config=replace(tide.config, model=model))
    assert len(padded.bins) == len(base.bins) + 64
    analysis.runs[1] = padded
    rows = run(analysis).tables["expected_updates"].rows
    assert {row[0] for row in rows} == {"base, tide", "the paper's budget on this text"}
    for name in {row[0] for row in rows}:
        assert sum(row[5] for row in rows if row[0] == name) == tide.tokenizer.vocab_size
    padded.__dict__["counts"] = padded.counts + np.eye(1, len(padded.counts), dtype=np.uint64)[0]
    apart = {row[0] for row in run(analysis).tables["expected_updates"].rows}
    assert apart == {"base", "tide", "the paper's budget on this text"}


def test_figure_leaves_out_deciles_without_types() -> None:
    counts = np.array([1, 2, 40, 957, 0, 0], np.uint64)
    setting = Setting("run", Schedule(100, 10), measure_updates(counts, BINS, Schedule(100, 10)))
    line = next(line for line in draw([setting], setting).axes[0].lines if "median" in str(line.get_label()))
    assert list(line.get_xdata()) == [0, 9]


def test_as_many_settings_as_there_are_colours_and_one_more_look_different() -> None:
    counts = np.array([1, 2, 40, 957, 0, 0], np.uint64)
    own = [
        Setting(f"run {i}", schedule, measure_updates(counts, BINS, schedule))
        for i, schedule in enumerate(Schedule(100 * i, 10) for i in range(1, 8))
    ]
    drawn = [line for line in draw(own, own[0]).axes[0].lines if "median" in str(line.get_label())]
    assert len({(line.get_color(), line.get_marker()) for line in drawn}) == 7
