"""Fixtures: the tiny run, a reference with its weights, a scorer over it in this process, evaluation options."""

import json

import pytest

from tests.zero_shot.oracle import Oracle
from tests.zero_shot.texts import questions
from tests.zero_shot.tiny import text_scorer
from tide_mega.lab.zero_shot.options import EvaluateOptions
from tide_mega.trained.run import TrainedRun


@pytest.fixture(scope="module")
def run(tiny_runs):
    return TrainedRun.open(tiny_runs[2])


@pytest.fixture(scope="module")
def oracle(run):
    return Oracle(run)


@pytest.fixture(scope="module")
def scorer(run, alone):
    return text_scorer(run, alone)


@pytest.fixture
def local(tmp_path):
    folder = tmp_path / "local"
    folder.mkdir()
    (folder / "arc_easy.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions()))
    endings = [{"context": "import os def return", "continuation": word} for word in ("self", "os")]
    (folder / "lambada_openai.jsonl").write_text("".join(json.dumps(e) + "\n" for e in endings))
    return folder


@pytest.fixture
def options(tiny_runs, local, tmp_path):
    return EvaluateOptions(
        run=[f"base={tiny_runs[0]}", f"tide={tiny_runs[2]}"],
        tasks=["arc_easy", "lambada_openai", "sciq"],
        local=str(local),
        out=str(tmp_path / "out"),
        device="cpu",
        batch=5,
    )
