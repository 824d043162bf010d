"""Trainings as a user starts them: killed at a random instant and resumed, and under torchrun."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.runs import TINY
from tide_mega.metrics.jsonl import read_metrics

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LONGER = ["trainer.max_steps=30", "trainer.eval_every=10", "checkpoint.every=4", "logging.every=1"]


def command(data, root, *overrides, launcher=()):
    words = [*TINY, *LONGER, f"data.path={data}", f"run.root={root}", "run.name=run", *overrides]
    return [sys.executable, *(launcher or ["-m"]), "tide_mega.train", *words]


def finish(words):
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def losses(root):
    records = read_metrics(root / "run" / "metrics.jsonl")
    return [(r["kind"], r["step"], r["loss"]) for r in records if "loss" in r]


def kill_once_past(words, metrics, lines, delay):
    """SIGKILL the training's whole process group some time after it has logged `lines` lines."""
    process = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 200
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, "the training ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(delay)  # the instant of the kill, not a synchronisation
    os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def test_killed_and_resumed_the_losses_are_the_same_to_the_last_bit(tiny_data, tmp_path):
    finish(command(tiny_data, tmp_path / "whole"))
    words = command(tiny_data, tmp_path / "killed")
    metrics = tmp_path / "killed" / "run" / "metrics.jsonl"
    chance = random.Random(7)
    for lines in (12, 36):
        assert kill_once_past(words, metrics, lines, chance.uniform(0.0, 0.15)) == -signal.SIGKILL
    output = finish(words)
    assert "resumed from" in output
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_torchrun_with_two_replicas_has_the_single_process_losses(tiny_data, tmp_path):
    overrides = ("trainer.max_steps=4", "trainer.eval_every=0")
    finish(command(tiny_data, tmp_path / "one", *overrides))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    output = finish(command(tiny_data, tmp_path / "two", *overrides, launcher=torchrun))
    assert "2 processes (tensor 1, pipeline 1, data 2)" in output
    alone, together = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [x[:2] for x in together] == [x[:2] for x in alone]
    assert [x[2] for x in together] == pytest.approx([x[2] for x in alone], rel=1e-5)


def test_data_that_is_not_there_is_one_sentence_and_a_status(tmp_path):
    done = subprocess.run(
        command(tmp_path / "nothing", tmp_path), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 3
    assert str(tmp_path / "nothing") in done.stderr
    assert "Traceback" not in done.stderr
