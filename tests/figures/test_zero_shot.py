from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from tide_mega.lab.figures import zero_shot
from tide_mega.lab.figures.analysis import SkippedError
from tide_mega.lab.zero_shot import record
from tide_mega.lab.zero_shot.options import EvaluateOptions
from tide_mega.lab.zero_shot.results import FILE, SCORING, Key, Measured, Result, Score, Stored


def result(checkpoint, task, accuracy, limit=None, precision="fp32", scoring=f", scoring {SCORING}"):
    key = Key(checkpoint, task, "hub", limit, precision, f"lm-eval 0{scoring}")
    measured = Measured({"acc": Score(accuracy, 0.02)}, 500, 0.25, (), 2000, 0, 0, 0)
    return Result(key, "a", "p", 6, 1536, 0, measured)


def folder_with(path, *results):
    (path / "evaluation").mkdir(parents=True)
    Stored({r.key: r for r in results}).write(path / "evaluation" / FILE)
    return path


def analysis_of(*runs):
    """Runs of (label, folder, checkpoint)."""
    opened = [
        SimpleNamespace(
            label=label, folder=folder, weights=SimpleNamespace(state=SimpleNamespace(save_id=checkpoint))
        )
        for label, folder, checkpoint in runs
    ]
    return SimpleNamespace(runs=opened)


def test_what_lies_with_one_run_serves_both(tmp_path):
    folder = folder_with(tmp_path / "b", result("one", "piqa", 0.25), result("two", "piqa", 0.75))
    section = zero_shot.run(analysis_of(("base", tmp_path / "a", "one"), ("TIDE", folder, "two")))
    (rows,) = [table.rows for table in section.tables.values()]
    assert [row[:3] for row in rows] == [("base", 25.0, 2.0), ("TIDE", 75.0, 2.0), ("chance", 25.0, None)]
    assert section.findings[1] == "TIDE: mean accuracy of 1 task 75.0 % ± 2.0, where guessing gives 25.0 %."
    assert not any("Not compared" in note for note in section.notes)


def test_only_tasks_evaluated_alike_are_compared_the_fullest_first():
    one = [result("one", "piqa", 0.1), result("one", "piqa", 0.2, limit=5), result("one", "boolq", 0.3)]
    two = [result("two", "piqa", 0.4), result("two", "piqa", 0.5, limit=5), result("two", "sciq", 0.6)]
    rows = zero_shot.in_common([one, two])
    assert [[(r.key.task, r.key.limit) for r in row] for row in rows] == [[("piqa", None)]] * 2
    assert [row[0].measured.scores["acc"].value for row in rows] == [0.1, 0.4]


def test_a_run_without_results_is_named(tmp_path):
    folder = folder_with(tmp_path / "b", result("two", "piqa", 0.75))
    section = zero_shot.run(analysis_of(("base", tmp_path / "a", "one"), ("TIDE", folder, "two")))
    assert section.notes[-1] == "base was not evaluated."
    assert len(section.tables["zero_shot"].rows) == 2


def test_without_results_it_says_which_command_makes_them(tmp_path):
    with pytest.raises(SkippedError, match=r"python -m tide_mega\.evaluate"):
        zero_shot.run(analysis_of(("base", tmp_path, "one")))
    folder = folder_with(tmp_path / "b", result("one", "piqa", 0.5), result("two", "sciq", 0.5))
    with pytest.raises(SkippedError, match="not evaluated on the same tasks"):
        zero_shot.run(analysis_of(("base", folder, "one"), ("TIDE", folder, "two")))


def test_tasks_that_are_not_shown_are_named_with_the_reason(tmp_path):
    old = {"scoring": ", scoring 1"}
    folder = folder_with(
        tmp_path / "b",
        *(result(run, "piqa", 0.5) for run in ("one", "two")),
        *(result(run, "boolq", 0.5, limit) for run, limit in (("one", 5), ("two", None))),
        *(result("two", task, 0.5) for task in ("sciq", "arc_easy")),
        *(result(run, "openbookqa", 0.5, **old) for run in ("one", "two")),
        result("one", "openbookqa", 0.5),
    )
    section = zero_shot.run(analysis_of(("base", folder, "one"), ("TIDE", folder, "two")))
    assert section.notes[-1] == (
        "Not compared: ARC-E, SciQ (base has no result); BoolQ (limit, precision, examples or harness differ); "
        "OBQA (TIDE has results of another scoring alone)."
    )
    columns = section.tables["zero_shot"].columns
    assert [name for name in columns if "error" not in name] == [
        "run",
        "PIQA (acc, %)",
        "mean accuracy (%)",
    ]


@pytest.mark.parametrize("scoring", ["", f", scoring {SCORING - 1}", f", scoring {SCORING}0"])
def test_results_of_another_scoring_are_not_shown(tmp_path, scoring):
    old = [result(run, "piqa", 0.5, scoring=scoring) for run in ("one", "two")]
    runs = ("base", tmp_path / "b", "one"), ("TIDE", tmp_path / "b", "two")
    folder_with(tmp_path / "b", *old)
    with pytest.raises(SkippedError, match="there are results of another scoring alone"):
        zero_shot.run(analysis_of(*runs))
    Stored({r.key: r for r in [*old, result("two", "piqa", 0.75)]}).write(
        tmp_path / "b" / "evaluation" / FILE
    )
    section = zero_shot.run(analysis_of(*runs))
    assert [row[:2] for row in section.tables["zero_shot"].rows] == [("TIDE", 75.0), ("chance", 25.0)]
    assert section.notes[-1] == "base has results of another scoring alone: evaluate it again."


def test_what_an_evaluation_writes_is_of_the_current_scoring(tmp_path, monkeypatch):
    monkeypatch.setattr(record.harness, "require", lambda: "lm_eval 0")
    monkeypatch.setattr(
        record.harness, "load_from_hub", lambda names: (SimpleNamespace(names=list(names)), {})
    )
    with ExitStack() as stack:
        version = record.ResultLog.open(EvaluateOptions(run=[], out=str(tmp_path)), [], stack).version
    assert Key("save", "piqa", "hub", None, "fp32", version).is_current


def test_each_tasks_own_limit_and_precision_are_noted(tmp_path):
    folder = folder_with(
        tmp_path / "b",
        *(result(run, "piqa", 0.5, limit=10) for run in ("one", "two")),
        *(result(run, "sciq", 0.5, precision="bf16") for run in ("one", "two")),
    )
    notes = zero_shot.run(analysis_of(("base", folder, "one"), ("TIDE", folder, "two"))).notes
    assert "Only the first 10 examples of PIQA (limit=10); all examples of SciQ." in notes
    harness = f"lm-eval 0, scoring {SCORING}"
    assert f"PIQA: examples from the hub; {harness}, fp32." in notes
    assert f"SciQ: examples from the hub; {harness}, bf16." in notes
