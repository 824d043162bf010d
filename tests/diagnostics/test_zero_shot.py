from types import SimpleNamespace

import pytest

from tide_mega.diagnostics import zero_shot
from tide_mega.diagnostics.analysis import SkippedError
from tide_mega.evaluation.results import FILE, Key, Measured, Result, Score, Stored


def result(checkpoint, task, accuracy, limit=None):
    key = Key(checkpoint, task, "hub", limit, "fp32", "lm-eval 0")
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
    assert section.findings[1] == "TIDE: mean accuracy 75.0 % ± 2.0, where guessing gives 25.0 %."


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
