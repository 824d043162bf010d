import csv
import math
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from tests.dashboard.samples import all_rows
from tide_mega.lab.dashboard.history import Row, RunHistory
from tide_mega.lab.dashboard.layout import (
    LOSS,
    LOSS_BY_FREQUENCY,
    ROUTING,
    SECTIONS,
    panels_without_data,
    remarks,
    summary,
)
from tide_mega.lab.dashboard.plots import draw, in_legend, run_styles, save_plots, series_csv, short_number
from tide_mega.lab.plotting import GREY


def history(label: str = "a", rows: list[Row] | None = None) -> RunHistory:
    return RunHistory(label, "x", all_rows() if rows is None else rows)


def titles(figure: Figure | None) -> list[str]:
    assert figure is not None
    return [axis.get_title() for axis in figure.axes]


def test_every_panel_of_a_full_run_is_drawn_with_title_labels_and_lines() -> None:
    for section in SECTIONS:
        figure = draw(section, [history()])
        assert figure is not None
        assert len(figure.axes) >= len(section.panels)
        for axis in figure.axes:
            assert axis.get_title() and axis.get_ylabel() and axis.get_xlabel() == "training tokens"
            assert all(len(line.get_xdata()) for line in axis.get_lines())


def test_loss_by_decile_is_the_first_panel_of_the_first_figure() -> None:
    assert titles(draw(SECTIONS[0], [history()]))[0] == "Held-out loss by decile (0 rarest)"


def test_drawn_values_are_those_logged() -> None:
    rows: list[Row] = [{"step": s, "tokens": 100 * s, "train/loss": 9.0 / s} for s in (1, 2, 4)]
    figure = draw(LOSS, [history(rows=rows)])
    assert titles(figure) == ["Training and held-out loss – train/loss"]
    assert figure is not None
    (line,) = figure.axes[0].get_lines()
    assert list(line.get_xdata()) == [100, 200, 400]
    assert list(line.get_ydata()) == [9.0, 4.5, 2.25]
    by_step = draw(LOSS, [history(rows=rows)], "step")
    assert by_step is not None and list(by_step.axes[0].get_lines()[0].get_xdata()) == [1, 2, 4]


def test_panels_without_finite_values_are_left_out() -> None:
    rows: list[Row] = [{"step": 1, "tokens": 2, "train/loss": math.nan, "lr": 0.1}]
    assert titles(draw(LOSS, [history(rows=rows)])) == ["Learning rate"]
    assert draw(ROUTING, [history(rows=rows)]) is None
    assert "Learning rate" not in panels_without_data(["lr"])
    assert "Training and held-out loss" in panels_without_data(["lr"])


def test_a_run_without_data_in_a_section_is_not_in_its_legend() -> None:
    base = history("base", [{"step": 1, "tokens": 2, "train/loss": 1.0}])
    tide = history("tide", [{"step": 1, "tokens": 2, "loss/rare": 1.0, "null_weight/layer_00": 0.5}])
    figure = draw(LOSS_BY_FREQUENCY, [base, tide])
    assert titles(figure) == ["Held-out loss: rare, mid, common – rare"] and figure is not None
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["tide"]


def test_the_baseline_of_runs_with_memory_is_grey_and_dashed() -> None:
    base = history("base", [{"step": 1, "tokens": 2, "train/loss": 1.0}])
    grey, blue, other = run_styles([base, history("a"), history("b")])
    assert (grey.colour, grey.dashes) == (GREY, "--")
    assert len({style.colour for style in (grey, blue, other)}) == 3
    assert len({str(style.dashes) for style in (grey, blue, other)}) == 3
    assert run_styles([base])[0].colour != GREY


@pytest.mark.parametrize("number", [1, 2, 12, 13, 28, 276])
def test_a_legend_names_both_ends_and_is_never_long(number: int) -> None:
    chosen = in_legend(number)
    assert len(chosen) <= 12 and chosen[0] == 0 and chosen[-1] == number - 1
    assert chosen == sorted(set(chosen))


def test_large_numbers_are_short() -> None:
    assert [short_number(n) for n in (0, 0.5, 950, 2e3, 1.5e6, 4e9, -1e12)] == [
        *("0", "0.5", "950", "2k", "1.5M", "4B", "-1T"),
    ]


def test_the_csv_has_every_value_in_full(tmp_path: Path) -> None:
    run = history(rows=[{"step": 1, "tokens": 2, "train/loss": 0.1 + 0.2, "unknown": math.inf}])
    lines = list(csv.DictReader(series_csv([run, history("b")]).splitlines()))
    assert lines[0] == {
        "run": "a",
        "metric": "train/loss",
        "step": "1",
        "tokens": "2",
        "value": "0.30000000000000004",
    }
    assert lines[1]["value"] == "inf"
    values = [(line["metric"], float(line["value"])) for line in lines if line["run"] == "b"]
    logged = [(name, value) for row in all_rows() for name, value in row.items()]
    assert sorted(values) == sorted((name, value) for name, value in logged if name not in ("step", "tokens"))


def test_files_of_every_section_are_written(tmp_path: Path) -> None:
    rows: list[Row] = [{"step": 1, "tokens": 2, "train/loss": 1.0, "loss_by_decile/0": 2.0}]
    written = save_plots([history(rows=rows)], tmp_path / "out")
    assert sorted(path.name for path in written) == [
        *("1_loss_by_frequency.png", "1_loss_by_frequency.svg", "2_loss.png", "2_loss.svg", "series.csv"),
    ]
    assert all(path.stat().st_size > 0 for path in written)


def test_a_run_in_a_line() -> None:
    rows: list[Row] = [
        {"step": 10, "tokens": 1000, "train/loss": 4.0},
        {"step": 20, "tokens": 2000, "train/loss": 3.0},
        {"step": 20, "tokens": 2000, "eval/loss": 3.5, "loss/rare": 7.0, "odd": math.nan},
    ]
    run = RunHistory("a", "here", rows, ["a note"])
    assert summary(run) == (
        "a: 3 records, 4 metrics, step 20, 2,000 tokens, "
        "training loss 3.000, held-out loss 3.500, rare 7.000 (here)"
    )
    assert remarks(run) == [
        "a note",
        "odd: 1 values are not finite, and not drawn",
        "no panel shows odd; series.csv has them",
    ]
    assert "nothing was logged" in summary(history(rows=[]))
