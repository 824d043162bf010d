"""Comparison of hand-made results: choice of metric, means, errors, statements about guessing."""

import math
from dataclasses import replace

import pytest

from tide_mega.lab.zero_shot.compare import compare, format_cell, like_guessing
from tide_mega.lab.zero_shot.output import as_text
from tide_mega.lab.zero_shot.results import Cell, Column, Key, Measured, Result, Score


def result(task, scores, label="base", chance=0.25, examples=100, limit=None, constant=(), **counts):
    measured = Measured(
        {name: Score(*pair) for name, pair in scores.items()},
        examples,
        chance,
        constant,
        **{"requests": 4 * examples, "truncated": 0, "windowed": 0, "apart": 0, **counts},
    )
    key = Key(f"save of {label}", task, "hub", limit, "fp32", "lm_eval 0.4.13")
    return Result(key, label, "somewhere", 10, 1000, 0, measured)


def column(chance, examples=100, constant=()):
    return Column("task", "Task", "acc", chance, constant, examples)


ARC = {"acc": (0.30, 0.04), "acc_norm": (0.40, 0.03)}
LAMBADA = {"perplexity": (12.5, 0.5), "acc": (0.5, 0.05)}


def test_columns_are_the_papers_perplexity_first_then_normalised_accuracy_where_there_is_one():
    table = compare(
        [[result("arc_easy", ARC), result("lambada_openai", LAMBADA, chance=0.0)]], ["base"], {}, "acc_norm"
    )
    shown = [(c.title, c.metric, c.chance) for c in table.columns]
    assert shown == [
        ("LAMBADA PPL", "perplexity", None),
        ("ARC-E", "acc_norm", 25.0),
        ("LAMBADA", "acc", 0.0),
    ]
    assert table.cells == ((Cell(12.5, 0.5), Cell(40.0, 3.0), Cell(50.0, 5.0)),)


def test_plain_accuracy_can_be_asked_for():
    table = compare([[result("arc_easy", ARC)]], ["base"], {}, "acc")
    assert [c.metric for c in table.columns] == ["acc"] and table.cells[0][0] == Cell(30.0, 4.0)


def test_the_mean_is_over_accuracies_alone_with_the_error_of_independent_tasks():
    results = [result("arc_easy", ARC), result("lambada_openai", LAMBADA, chance=0.0)]
    table = compare([results], ["base"], {}, "acc_norm")
    assert table.means == (Cell(45.0, pytest.approx(math.hypot(3.0, 5.0) / 2)),)
    assert table.mean_chance == 12.5


def test_no_accuracy_no_mean():
    table = compare(
        [[result("wiki", {"word_perplexity": (20.0, None)}, chance=None)]], ["base"], {}, "acc_norm"
    )
    assert table.means == (None,) and table.mean_chance is None and table.findings == ()


def test_what_is_no_share_is_shown_as_it_is_and_left_out_of_the_mean():
    results = [
        result("piqa", {"acc": (0.6, 0.02)}, chance=0.5),
        result("gsm8k", {"exact_match (strict-match)": (0.1, 0.01)}, chance=None),
        result("mrpc", {"f1": (0.2, 0.02)}, chance=None),
        result("cola", {"mcc": (-0.07, 0.02)}, chance=None),
        result("wmt", {"bleu": (23.5, 0.4)}, chance=None),
    ]
    table = compare([results], ["base"], {}, "acc_norm")
    assert [cell.value for cell in table.cells[0]] == [60.0, 10.0, 20.0, -0.07, 23.5]
    assert table.means[0].value == pytest.approx(30.0)
    (line,) = [line for line in as_text(table).splitlines() if line.startswith("base ")]
    numbers = " ".join(line.split()[1:])
    assert numbers == "60.0 ± 2.0 10.0 ± 1.0 20.0 ± 2.0 -0.070 ± 0.020 23.5 ± 0.4 30.0 ± 1.0"


@pytest.mark.parametrize(
    ("value", "stderr", "chance", "constant", "said"),
    [
        (26.0, 1.0, 25.0, (), "chance 25.0 %"),
        (40.0, 4.0, 25.0, (), None),
        (33.9, 4.5, 25.0, (), "chance 25.0 %"),
        (34.1, 4.5, 25.0, (), None),
        (0.0, 0.0, 0.0, (), "chance 0.0 %"),  # LAMBADA: not one right
        (100.0, 0.0, 50.0, (), None),
        (10.0, 1.0, 50.0, (), "below chance 50.0 %"),
        (62.0, 0.5, 50.0, (37.8, 62.2), "one answer given always 62.2 %"),
        (90.0, 3.0, 50.0, (37.8, 62.2), None),
        (60.0, None, None, (), None),
    ],
)
def test_a_score_is_set_against_guessing(value, stderr, chance, constant, said):
    assert like_guessing(column(chance, 100, constant), Cell(value, stderr)) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (45.0, "below one answer given always 62.2 %"),
        (56.0, "below one answer given always 62.2 %"),
        (60.4, "below one answer given always 62.2 %"),
        (61.7, "one answer given always 62.2 %"),
        (63.8, "one answer given always 62.2 %"),
        (64.0, None),
    ],
)
def test_between_chance_and_the_commoner_answer_is_no_better_than_guessing(value, said):
    """BoolQ's 3,270 examples, of which 62.2 % are yes: 2 standard errors are 1.7 points."""
    stderr = math.sqrt(value * (100 - value) / 3270)
    assert like_guessing(column(50.0, 3270, (37.8, 62.2)), Cell(value, stderr)) == said


def test_guessings_own_error_counts_where_a_score_has_none():
    """Two of two right says nothing, although a score of 100 % has no error."""
    assert like_guessing(column(50.0, 2), Cell(100.0, 0.0)) == "chance 50.0 %"
    assert like_guessing(column(50.0, 200), Cell(100.0, 0.0)) is None


def test_findings_name_the_scores_that_guessing_would_give():
    near = {"acc": (0.26, 0.04), "acc_norm": (0.24, 0.04)}
    base = [result("arc_easy", near), result("piqa", {"acc": (0.9, 0.01)}, chance=0.5)]
    both_near = [result("arc_easy", near, "tide"), result("piqa", {"acc": (0.5, 0.05)}, "tide", chance=0.5)]
    first, second, gap = compare([base, both_near], ["base", "tide"], {}, "acc_norm").findings
    assert (
        first.startswith("base: 1 of 2 accuracies are not better than guessing")
        and "ARC-E 24.0 ± 4.0 %" in first
    )
    assert "PIQA" not in first
    assert (
        second.startswith("tide: no accuracy is better than guessing")
        and "PIQA 50.0 ± 5.0 % (chance 50.0 %)" in second
    )
    assert gap.startswith("tide is on average 20.00 points below base (more than 2 standard errors")


def test_a_small_difference_is_said_to_be_within_its_error():
    runs = [[result("piqa", {"acc": (0.60, 0.02)}, label)] for label in ("base", "tide")]
    (gap,) = compare(runs, ["base", "tide"], {}, "acc_norm").findings[-1:]
    assert "0.00 points above base (within 2 standard errors of the difference, 2.83 each" in gap


def test_notes_tell_what_was_cut_and_left_out():
    runs = [
        [result("boolq", {"acc": (0.9, 0.01)}, limit=100, truncated=7, windowed=windowed, apart=1)]
        for windowed in (2, 0)
    ]
    notes = "\n".join(compare(runs, ["base", "tide"], {"sciq": "needs the hub"}, "acc_norm").notes)
    assert "BoolQ: 7 of 400 requests lost the beginning of their context" in notes
    assert notes.count("longest sequence (base, tide).") == 1 and "in windows (base)." in notes
    assert (
        "2 of 400 requests were longer than a sequence" in notes and "1 of 400 requests had context" in notes
    )
    assert "first 100 examples" in notes and "lm_eval 0.4.13, fp32" in notes


def test_notes_say_of_each_task_how_it_was_evaluated_where_tasks_differ():
    piqa = result("piqa", {"acc": (0.6, 0.02)}, limit=10)
    arc = result("arc_easy", ARC, limit=1000)
    sciq, boolq = (result(task, {"acc": (0.6, 0.02)}) for task in ("sciq", "boolq"))
    sciq = replace(sciq, key=replace(sciq.key, precision="bf16", source="0a1b"))
    notes = compare([[piqa, arc, sciq, boolq]], ["base"], {}, "acc_norm").notes
    assert notes[2:] == (
        "Only the first 10 examples of PIQA (limit=10); the first 1,000 examples of ARC-E (limit=1000); all "
        "examples of SciQ, BoolQ.",
        "PIQA, ARC-E, BoolQ: examples from the hub; lm_eval 0.4.13, fp32.",
        "SciQ: examples from local files, with prompts as the harness's tasks have them; lm_eval 0.4.13, bf16.",
    )
    assert compare([[boolq]], ["base"], {}, "acc_norm").notes[2:] == (
        "Examples from the hub; lm_eval 0.4.13, fp32.",
    )
    boolq = replace(boolq, key=replace(boolq.key, source="0a1b"))
    assert compare([[boolq]], ["base"], {}, "acc_norm").notes[3:] == (
        "BoolQ's passages have no titles in the local file, unlike the harness's.",
    )


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (Cell(25.44, 0.93), "25.4 ± 0.9"),
        (Cell(25.44, None), "25.4"),
        (Cell(12345.6, 78.9), "12,346 ± 79"),
        (Cell(1.677e9, 1.64e8), "1.7e+09 ± 1.6e+08"),
    ],
)
def test_cells_are_short(cell, text):
    assert format_cell(cell) == text
