"""Whole small trainings in which something goes wrong."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import TINY, curve, tiny, train_here, train_until
from tests.support.slow import quick_and_slow
from tide_mega.errors import ConfigError, DataError, Exit
from tide_mega.metrics.jsonl import read_metrics
from tide_mega.parallel.groups import World
from tide_mega.training.faults.policy import DivergedError
from tide_mega.training.trainer import Trainer

SPIKE = ("faults.spike_window=8", "trainer.max_steps=14", "checkpoint.every=5", "trainer.eval_every=0")


def attempt(config):
    try:
        return train_here(config)
    except (ConfigError, DataError, DivergedError) as error:
        return type(error).__name__, str(error)


def events(root):
    records = read_metrics(root / "tiny" / "metrics.jsonl")
    return [(r["event"], r["at_step"], r["step"]) for r in records if r["kind"] == "event"]


def summary(root):
    return json.loads((root / "tiny" / "summary.json").read_text())


@pytest.mark.parametrize(("on_spike", "skipped"), [("log", 0), ("skip", 1)])
def test_a_spike_is_logged_or_skipped(pools, tiny_data, tmp_path, on_spike, skipped):
    config = tiny(tiny_data, tmp_path, *SPIKE, f"faults.on_spike={on_spike}", "faults.inject=[spike@12]")
    assert pools(1).run(train_here, config) == [14]
    assert events(tmp_path) == [("skipped" if skipped else "spike", 12, 12)]
    came_to = summary(tmp_path)
    assert (came_to["spikes"], came_to["skipped_steps"], came_to["is_complete"]) == (1, skipped, True)


def test_a_rollback_goes_on_past_the_data_of_the_spike(pools, tiny_data, tmp_path):
    config = tiny(tiny_data, tmp_path, *SPIKE, "faults.on_spike=rollback", "faults.inject=[spike@12]")
    assert pools(1).run(train_here, config) == [14]
    assert events(tmp_path) == [("rollback", 12, 10)]
    records = [r for r in read_metrics(tmp_path / "tiny" / "metrics.jsonl") if r["kind"] == "train"]
    assert [r["step"] for r in records] == [2, 4, 6, 8, 10, 12, 14]
    batch = 8 * 32
    assert [r["tokens"] // batch for r in records] == [2, 4, 6, 8, 10, 14, 16]
    assert [r["rollbacks"] for r in records] == [0, 0, 0, 0, 0, 1, 1]
    assert summary(tmp_path)["seconds"]["lost"] > 0


def train_without_checkpoints_to_go_back_to(config):
    trainer = Trainer(config, World.from_environment())
    trainer.checkpoints.restore = lambda before=None: None
    try:
        trainer.run()
        return trainer.state.step
    finally:
        trainer.close()


def test_a_rollback_that_finds_no_checkpoint_is_a_skipped_step_in_every_respect(pools, tiny_data, tmp_path):
    words = (
        "faults.on_spike=rollback",
        "faults.inject=[spike@12]",
        "trainer.eval_every=4",
        "checkpoint.every=4",
    )
    config = tiny(tiny_data, tmp_path, *SPIKE, *words)
    assert pools(1).run(train_without_checkpoints_to_go_back_to, config) == [14]
    assert events(tmp_path) == [("skipped", 12, 12)]
    records = read_metrics(tmp_path / "tiny" / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "train"] == [2, 4, 6, 8, 10, 12, 14]
    assert [r["step"] for r in records if r["kind"] == "eval"] == [4, 8, 12, 14]
    came_to = summary(tmp_path)
    assert (came_to["spikes"], came_to["skipped_steps"], came_to["rollbacks"]) == (1, 1, 0)
    assert came_to["seconds"]["skipped"] > 0


@pytest.mark.parametrize("kill_at", quick_and_slow([11], [7, 11, 13]))
def test_a_resumed_run_deals_with_faults_as_the_uninterrupted_one(pools, tiny_data, tmp_path, kill_at):
    overrides = (
        *SPIKE,
        "faults.on_spike=rollback",
        "faults.inject=[nan_loss@3,nan_grad@8,spike@12]",
        "memory.exchange_ahead=true",
    )
    pools(1).run(train_here, tiny(tiny_data, tmp_path / "whole", *overrides))
    broken = tiny(tiny_data, tmp_path / "broken", *overrides)
    pools(1).run(train_until, broken, kill_at)
    assert pools(1).run(train_here, broken) == [14]
    whole, resumed = (curve(tmp_path / name / "tiny" / "metrics.jsonl") for name in ("whole", "broken"))
    for line in (*whole, *resumed):  # bytes moved since the last line: a killed process takes its count along
        line.pop("traffic", None)
    assert resumed == whole
    assert [(r["event"], r["at_step"], r["step"]) for r in whole if r["kind"] == "event"] == [
        ("skipped", 3, 3),
        ("skipped", 8, 8),
        ("rollback", 12, 10),
    ]


def test_rollbacks_past_the_limit_stop_the_run(pools, tiny_data, tmp_path):
    config = tiny(
        tiny_data,
        tmp_path,
        *SPIKE,
        "faults.on_spike=rollback",
        "faults.max_rollbacks=1",
        "faults.inject=[spike@12,spike@13]",
    )
    ((kind, message),) = pools(1).run(attempt, config)
    assert kind == "DivergedError"
    assert "after 1 rollbacks" in message
    assert summary(tmp_path)["ended_by"].startswith("DivergedError")
    assert events(tmp_path) == [("rollback", 12, 10), ("rollback", 11, 11)]


@pytest.mark.slow
def test_a_slow_rank_is_named(pools, tiny_data, tmp_path):
    words = ("trainer.eval_every=0", "faults.inject=[slow@3:1:0.4]", "memory.owners=tensor")
    assert pools(2).run(train_here, tiny(tiny_data, tmp_path, *words, world_size=2)) == [6, 6]
    slow = {r["step"]: r for r in read_metrics(tmp_path / "tiny" / "metrics.jsonl") if r["kind"] == "train"}
    assert slow[4]["slow_ranks"] == slow[6]["slow_ranks"] == [1]
    assert slow[6]["slowest_ratio"] > 1.5


def test_goodput_adds_up_over_restarts(pools, tiny_data, tmp_path):
    config = tiny(tiny_data, tmp_path)
    assert pools(1).run(train_until, config, 5) == [5]
    assert pools(1).run(train_here, config) == [6]
    came_to = summary(tmp_path)
    assert came_to["restarts"] == 1
    assert sum(came_to["seconds"].values()) == pytest.approx(came_to["wall_seconds"])
    assert came_to["seconds"]["lost"] > 0  # steps 4 and 5
    assert came_to["seconds"]["compute"] / came_to["wall_seconds"] == pytest.approx(came_to["goodput"])
    records = read_metrics(tmp_path / "tiny" / "metrics.jsonl")
    assert all(0 < r["goodput"] < 1 for r in records if r["kind"] == "train")


def start(rank, world, port, words):
    environment = {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "tide_mega.train", *words],
        env=environment,
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_hung_rank_is_found_with_its_stack_and_the_restarted_job_finishes(tiny_data, tmp_path):
    words = [*TINY, f"data.path={tiny_data}", f"run.root={tmp_path}", "run.name=tiny"]
    words += ["faults.inject=[hang@5:1]", "faults.hang_minutes=0.2", "data.num_workers=1"]

    def run():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = [start(rank, 2, port, words) for rank in range(2)]
        try:
            outputs = [process.communicate(timeout=240) for process in processes]
        finally:
            for process in processes:
                process.kill()
        return [process.returncode for process in processes], outputs

    statuses, outputs = run()
    assert statuses == [Exit.HUNG, Exit.HUNG], outputs
    stacks = [(tmp_path / "tiny" / "hangs" / f"rank-{rank}.txt").read_text() for rank in range(2)]
    assert "guard.py" in stacks[1] and "in before" in stacks[1]
    assert "in before" not in stacks[0]
    assert "no progress" in outputs[1][1] and "in before" in outputs[1][1]
    statuses, outputs = run()
    assert statuses == [0, 0], outputs
    assert "resumed from" in outputs[0][0]
    came_to = summary(tmp_path)
    assert (came_to["is_complete"], came_to["restarts"]) == (True, 1)
