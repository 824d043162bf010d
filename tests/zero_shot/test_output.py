"""Text, CSV, figure and JSON of one comparison."""

import csv
import io
import json

import pytest
from matplotlib.figure import Figure

from tests.zero_shot.test_compare import ARC, LAMBADA, result
from tide_mega.errors import EvaluationError
from tide_mega.lab.zero_shot.compare import compare
from tide_mega.lab.zero_shot.output import as_csv, as_text, draw, write_all
from tide_mega.lab.zero_shot.results import Stored, read

ABSENT = {"sciq": "needs the hub (ConnectionError)"}


def runs(count=2):
    return [
        [
            result("arc_easy", ARC, f"run {i}"),
            result("lambada_openai", LAMBADA, f"run {i}", chance=0.0),
            result("boolq", {"acc": (0.6, 0.02)}, f"run {i}", chance=0.5, constant=(0.4, 0.6)),
        ]
        for i in range(count)
    ]


def comparison(count=2, absent=ABSENT):
    return compare(runs(count), [f"run {i}" for i in range(count)], absent, "acc_norm")


def test_the_text_has_a_row_for_each_run_chance_and_what_was_left_out():
    lines = as_text(comparison()).splitlines()
    assert lines[0].split() == ["run", "LAMBADA", "PPL", "ARC-E", "LAMBADA", "BoolQ", "mean"]
    assert lines[1].split() == ["perplexity", "acc_norm", "acc", "acc"]
    assert lines[3].split()[:8] == ["run", "0", "12.5", "±", "0.5", "40.0", "±", "3.0"]
    assert lines[5].split() == ["chance", "-", "25.0", "0.0", "50.0", "25.0"]
    assert lines[6] == "not evaluated: sciq: needs the hub (ConnectionError)"
    assert len({len(line) for line in lines[2:6]}) == 1


def test_the_csv_has_every_number_and_the_reason_of_every_absence():
    rows = list(csv.DictReader(io.StringIO(as_csv(comparison()))))
    assert len(rows) == 2 * (4 + 1) + 1
    first = rows[1]
    assert (first["run"], first["task"], first["metric"], first["unit"]) == (
        "run 0",
        "arc_easy",
        "acc_norm",
        "%",
    )
    assert [float(first[name]) for name in ("value", "standard_error", "chance", "examples")] == [
        40,
        3,
        25,
        100,
    ]
    assert rows[0]["unit"] == "" and rows[4]["task"] == "mean" and float(rows[4]["value"]) == 50.0
    assert rows[-1]["task"] == "sciq" and rows[-1]["status"].startswith("not evaluated: needs the hub")


def test_bars_have_the_heights_and_errors_of_the_table_and_chance_is_marked():
    figure = draw(comparison())
    assert isinstance(figure, Figure)
    accuracy, perplexity = figure.axes
    assert [bars.get_label() for bars in accuracy.containers if hasattr(bars, "patches")] == [
        "run 0",
        "run 1",
    ]
    heights = [patch.get_height() for patch in accuracy.patches]
    assert heights == pytest.approx([40, 50, 60, 50] * 2)
    assert [text.get_text() for text in accuracy.get_xticklabels()] == ["ARC-E", "LAMBADA", "BoolQ", "mean"]
    marks = [line.get_ydata()[0] for line in accuracy.lines if line.get_linestyle() == "--"]
    assert marks == [25.0, 0.0, 50.0, 25.0]
    assert [patch.get_height() for patch in perplexity.patches] == [12.5, 12.5]
    assert perplexity.get_ylim()[0] == accuracy.get_ylim()[0] == 0


@pytest.mark.parametrize("tasks", [slice(0, 1), slice(2, 3)])
def test_one_task_has_one_panel(tasks):
    chosen = [results[tasks] for results in runs(1)]
    assert len(draw(compare(chosen, ["run 0"], {}, "acc_norm")).axes) == 1


def test_what_is_neither_accuracy_nor_perplexity_has_a_panel_of_its_own():
    more = [result("cola", {"mcc": (-0.07, 0.02)}, "run 0", chance=None)]
    accuracy, perplexity, other = draw(compare([runs(1)[0] + more], ["run 0"], {}, "acc_norm")).axes
    assert [len(axis.patches) for axis in (accuracy, perplexity, other)] == [4, 1, 1]
    assert other.get_title() == "Other metrics" and other.patches[0].get_height() == -0.07
    assert [text.get_text() for text in other.get_xticklabels()] == ["cola\nmcc"]
    assert other.get_ylim()[0] < -0.09


def test_what_is_written_is_read_again(tmp_path):
    results = {r.key: r for row in runs() for r in row}
    stored = Stored(results, comparison())
    stored.write(tmp_path / "new" / "zero_shot.json")
    assert read(tmp_path / "new" / "zero_shot.json") == stored
    Stored().write(tmp_path / "zero_shot.json")
    assert read(tmp_path / "zero_shot.json") == Stored()


def test_files_lie_beside_each_other(tmp_path):
    assert [path.name for path in write_all(comparison(), tmp_path)] == [
        "zero_shot.txt",
        "zero_shot.csv",
        "zero_shot.png",
    ]
    assert (tmp_path / "zero_shot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("nothing", "is not an evaluation's result"),
        ("[]", "is not an evaluation's result"),
        ('{"format": 1, "results": [{}]}', "is not an evaluation's result"),
        (json.dumps({"format": 99}), "is of format 99, .*: move it away, or give another out=<folder>"),
    ],
)
def test_another_file_is_not_taken_for_a_result(tmp_path, content, problem):
    path = tmp_path / "zero_shot.json"
    path.write_text(content)
    with pytest.raises(EvaluationError, match=problem):
        read(path)
