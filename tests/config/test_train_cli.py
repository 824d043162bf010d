"""The real entry point's command line, as a user meets it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def train(*words):
    command = [sys.executable, "-m", "tide_mega.train", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


def test_help_explains_groups_and_keys():
    done = train("--help")
    assert done.returncode == 0
    assert "python -m tide_mega.train" in done.stdout
    assert "tide_8e_1b" in done.stdout and "optim.lr (float" in done.stdout


def test_cfg_job_prints_the_composed_configuration():
    done = train("--cfg", "job", "experiment=tide_8e_1b", "optim.lr=2e-4")
    assert done.returncode == 0
    assert "num_blocks: 8" in done.stdout and "lr: 0.0002" in done.stdout


@pytest.mark.parametrize("word", ["optim.lrr=1", "optim.lr=abc", "parallel.tensor=3", "model=2b"])
def test_a_mistake_is_one_sentence_and_status_2(word):
    done = train(word)
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0
    assert word.split("=")[0] in done.stderr
