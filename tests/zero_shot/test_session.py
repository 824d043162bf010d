"""Whole evaluations of tiny runs: the reference's answers, resuming, several processes, real question sets."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from tests.zero_shot.texts import questions
from tide_mega.errors import ConfigError, EvaluationError
from tide_mega.lab.zero_shot import harness
from tide_mega.lab.zero_shot.results import read
from tide_mega.lab.zero_shot.session import evaluate
from tide_mega.parallel.device import choose_device

REAL = Path(__file__).parents[3] / "shared" / "data" / "evals"


def test_accuracy_is_that_of_the_references_choices(options, alone, oracle):
    table = evaluate(replace(options, run=options.run[1:], metric="acc"), alone)
    right = 0
    for question in questions():
        prompt = oracle.encode(question["query"] + "\nAnswer:")
        nats = [oracle.score(prompt, oracle.encode(" " + choice))[0] for choice in question["choices"]]
        right += nats.index(max(nats)) == question["gold"]
    assert [c.metric for c in table.columns] == ["perplexity", "acc", "acc"]
    assert table.cells[0][1].value == pytest.approx(100 * right / 12)
    assert table.columns[1].chance == pytest.approx(100 / 3)
    assert table.absent == {"sciq": "needs the hub: it has no local version (leave out local=)"}


def test_several_runs_leave_one_table(options, alone):
    table = evaluate(options, alone)
    out = Path(options.out)
    assert {path.name for path in out.iterdir()} == {
        f"zero_shot.{kind}" for kind in ("json", "txt", "csv", "png")
    }
    assert table.labels == ("base", "tide")
    stored = read(out / "zero_shot.json")
    assert stored.comparison == table and len(stored.results) == 4
    assert [(r.label, r.num_blocks, r.step) for r in stored.results.values()] == [("base", 0, 6)] * 2 + [
        ("tide", 2, 6)
    ] * 2
    rows = list(csv.DictReader((out / "zero_shot.csv").open()))
    assert {row["run"] for row in rows} == {"base", "tide", ""}


@pytest.mark.slow
def test_what_is_there_is_not_computed_again(options, alone, local, monkeypatch):
    asked = []
    plain = harness.Tasks.measure

    def measure(self, name, scorer, limit):
        asked.append((scorer.replicas.scorer.model.run.label, name, limit))
        return plain(self, name, scorer, limit)

    def asked_by(options):
        asked.clear()
        evaluate(options, alone)
        return list(asked)

    monkeypatch.setattr(harness.Tasks, "measure", measure)
    one = replace(options, run=options.run[:1], tasks=["arc_easy"])
    assert asked_by(one) == [("base", "arc_easy", None)]
    assert asked_by(one) == []
    assert asked_by(replace(one, limit=3)) == [("base", "arc_easy", 3)]
    assert asked_by(replace(one, precision="bf16")) == [("base", "arc_easy", None)]
    rest = [("base", "lambada_openai", None), ("tide", "arc_easy", None), ("tide", "lambada_openai", None)]
    assert asked_by(options) == rest
    assert asked_by(replace(options, batch=2, metric="acc")) == []
    assert asked_by(replace(one, fresh=True)) == [("base", "arc_easy", None)]
    earlier = options.run[0] + "/checkpoints/step-00000003"
    assert asked_by(replace(one, run=[earlier])) == [("base", "arc_easy", None)]
    with (local / "arc_easy.jsonl").open("a") as file:
        file.write(json.dumps(questions()[0]) + "\n")
    assert asked_by(one) == [("base", "arc_easy", None)]
    assert len(read(Path(options.out) / "zero_shot.json").results) == 8


def test_an_evaluation_cut_short_keeps_what_it_finished(options, alone, monkeypatch):
    plain = harness.Tasks.measure

    def measure(self, name, scorer, limit):
        if name == "lambada_openai":
            raise EvaluationError("out of memory")
        return plain(self, name, scorer, limit)

    with monkeypatch.context() as patched:
        patched.setattr(harness.Tasks, "measure", measure)
        with pytest.raises(EvaluationError, match="out of memory"):
            evaluate(options, alone)
    stored = read(Path(options.out) / "zero_shot.json")
    assert [key.task for key in stored.results] == ["arc_easy"] and stored.comparison is None
    evaluate(options, alone)
    assert len(read(Path(options.out) / "zero_shot.json").results) == 4


def test_results_lie_in_the_last_runs_folder(options, alone, tiny_runs, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(tiny_runs[0], copy)
    evaluate(replace(options, run=[str(copy)], tasks=["lambada_openai"], out=None), alone)
    assert (copy / "evaluation" / "zero_shot.json").is_file()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"run": ["base=X", "base=Y"]}, "two runs are called base"),
        ({"tensor": 2}, "does not divide the 1 process"),
        ({"pipeline": 3}, "pipeline=3 does not divide model.num_layers=2"),
        ({"limit": 0}, "limit=0"),
        ({"batch": 0}, "batch=0"),
        ({"metric": "f1"}, "metric=f1 is not known: use acc_norm or acc"),
        ({"tasks": []}, "tasks= is empty"),
        ({"tasks": ["piqa", "piqa"]}, "names one twice"),
        ({"local": "/nowhere"}, "local=/nowhere is not a folder"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, alone, tiny_runs, change, problem):
    if "run" in change:
        change = {"run": [f"base={tiny_runs[0]}", f"base={tiny_runs[2]}"]}
    with pytest.raises(ConfigError, match=problem):
        evaluate(replace(options, **change), alone)


def test_no_task_at_all_is_an_error_that_names_them(options, alone):
    with pytest.raises(EvaluationError, match="no task can be evaluated: sciq needs the hub"):
        evaluate(replace(options, tasks=["sciq"]), alone)


@pytest.mark.slow
def test_beside_local_files_a_misspelt_task_is_refused_and_another_one_named(options, alone):
    with pytest.raises(
        ConfigError, match=r"tasks=arc_esay is no task of lm_eval .*: the nearest name is arc_easy"
    ):
        evaluate(replace(options, tasks=["arc_easy", "arc_esay"]), alone)
    table = evaluate(replace(options, tasks=["lambada_openai", "winogrande"]), alone)
    assert table.absent == {"winogrande": "needs the hub: it has no local version (leave out local=)"}


def evaluate_here(options):
    return evaluate(options, choose_device("cpu", 0))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{}, {"tensor": 2}])
def test_two_processes_give_the_table_of_one(options, alone, pools, tmp_path, sizes):
    table, nothing = pools(2).run(evaluate_here, replace(options, out=str(tmp_path / "two"), **sizes))
    assert nothing is None
    one = evaluate(options, alone)
    assert table.columns == one.columns
    for row, expected in zip(table.cells, one.cells, strict=True):
        assert [c.value for c in row] == pytest.approx([c.value for c in expected], rel=1e-4)


def refused_here(options):
    try:
        evaluate(options, choose_device("cpu", 0))
    except (ConfigError, EvaluationError) as error:
        return str(error)


def test_a_damaged_file_ends_all_processes_with_the_same_sentence(options, pools, local):
    (local / "arc_easy.jsonl").write_text("{}\n")
    first, second = pools(2).run(refused_here, options)
    assert first == second and "arc_easy.jsonl line 1 has no text under 'query'" in first


@pytest.mark.slow
def test_the_command_runs_under_torchrun_and_a_failure_ends_it(options, local, tmp_path):
    root = Path(__file__).parents[2]
    words = [
        f"run={','.join(options.run)}",
        "tasks=arc_easy,sciq",
        f"local={local}",
        f"out={tmp_path / 'out'}",
    ]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "-m",
        "tide_mega.evaluate",
        *words,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}

    def run(*more):
        done = subprocess.run(
            [*command, "device=cpu", "threads=1", *more],
            cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    status, said, errors = run("pipeline=2")
    assert status == 0, errors
    assert "not evaluated: sciq: needs the hub" in said and said.count("chance") >= 1
    (local / "arc_easy.jsonl").write_text("not JSON\n")
    status, _, errors = run()
    assert status != 0 and "arc_easy.jsonl line 1 is not JSON" in errors


@pytest.mark.skipif(not REAL.is_dir(), reason="the real question sets are not there")
def test_real_sets_with_a_small_limit(options, alone):
    names = ["arc_easy", "arc_challenge", "piqa", "lambada_openai", "boolq", "openbookqa"]
    table = evaluate(replace(options, run=options.run[1:], tasks=names, local=str(REAL), limit=6), alone)
    assert not table.absent
    chances = {c.task: c.chance for c in table.columns if c.metric != "perplexity"}
    assert chances == {
        "arc_easy": 25, "arc_challenge": 25, "piqa": 50, "lambada_openai": 0, "boolq": 50, "openbookqa": 25
    }  # fmt: skip
    assert all(c.examples == 6 for c in table.columns)
    assert any("BoolQ" in note and "lost the beginning" in note for note in table.notes)
