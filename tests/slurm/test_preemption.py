"""Real trainings on two nodes: preempted, cancelled, bereft of a node; and the check of the nodes."""

import json
import sys

import pytest

from tests.slurm.conftest import wait_until
from tests.support.runs import TINY, tiny, train_here
from tide_mega.metrics.jsonl import read_metrics

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

LONG = ("trainer.max_steps=40", "trainer.eval_every=0", "optim.warmup_steps=5")
"""Long enough to be met while it runs."""
OFTEN = ("logging.every=1", "checkpoint.every=20")


class Run:
    """A training job on the private cluster."""

    def __init__(self, cluster, data, root):
        self.cluster, self.data, self.root = cluster, data, root
        self.log, self.folder = root / "log", root / "run"

    def submit(self, *overrides, tasks=1, **environment):
        words = [*TINY, *LONG, *OFTEN, f"data.path={self.data}", f"run.root={self.root}", *overrides]
        shape = ("--nodes=2", f"--ntasks-per-node={tasks}", "--gpus-per-node=0", f"--output={self.log}")
        environment = {"TIDE_HEALTH": "0", "TIDE_RUN_NAME": "run", "TIDE_VENV": sys.prefix} | environment
        done = self.cluster.run(
            "sbatch", "--parsable", *shape, "slurm/tide_1b.sh", *words, OMP_NUM_THREADS="1", **environment
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def text(self):
        return self.log.read_text() if self.log.exists() else ""

    def records(self):
        path = self.folder / "metrics.jsonl"
        return [r for r in read_metrics(path) if r["kind"] == "train"] if path.exists() else []

    def wait_for_step(self, step):
        def reached():
            return any(record["step"] >= step for record in self.records())

        wait_until(reached, f"step {step}", lambda: self.text() + self.cluster.logs(), timeout=300)


@pytest.fixture
def run(cluster, tiny_data, tmp_path):
    return Run(cluster, tiny_data, tmp_path)


@pytest.fixture(scope="module")
def expected(pools, tiny_data, tmp_path_factory):
    """Loss of every step of the run that nothing disturbs, in one process."""
    root = tmp_path_factory.mktemp("alone")
    assert pools(1).run(train_here, tiny(tiny_data, root, *LONG, *OFTEN)) == [40]
    return [r["loss"] for r in read_metrics(root / "tiny" / "metrics.jsonl") if r["kind"] == "train"]


def assert_whole(run, expected):
    """Every step is logged once, with the loss of the run that nothing disturbed."""
    records = run.records()
    assert [r["step"] for r in records] == list(range(1, 41))
    assert [r["loss"] for r in records] == pytest.approx(expected, rel=1e-4)


def test_a_preempted_run_is_saved_requeued_and_goes_on_with_the_same_losses(run, cluster, expected):
    job = run.submit("logging.wandb=offline")
    run.wait_for_step(5)
    assert cluster.run("scancel", "--batch", "--signal=USR1", job).returncode == 0
    fields = cluster.finish(job, timeout=300, restarts=1)
    log = run.text()
    assert fields["JobState"] == "COMPLETED", log
    assert "SIGUSR1 came: saving after step" in log
    assert "Exit status 75: the run was stopped and is saved; requeued (restart 1 of at most 100)" in log
    assert "resumed from" in log
    assert_whole(run, expected)
    environment = json.loads((run.folder / "environment.json").read_text())
    assert [(s["job"], s["restart"], s["nodes"]) for s in environment["starts"]] == [(job, 0, 2), (job, 1, 2)]
    runs = {path.name.rsplit("-", 1)[1] for path in (run.folder / "wandb").glob("offline-run-*")}
    assert runs == {(run.folder / "wandb_run_id").read_text().strip()}, "one W&B run over both starts"
    # The same command again has nothing to do.
    job = run.submit("logging.wandb=offline")
    assert cluster.finish(job, timeout=300)["JobState"] == "COMPLETED"
    assert "is complete: 40 steps done, nothing to train" in run.text()


def test_a_node_that_goes_down_costs_the_steps_since_the_last_checkpoint(run, cluster, expected):
    job = run.submit()
    run.wait_for_step(25)
    cluster.run("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
    try:
        wait_until(
            lambda: cluster.fields(job).get("JobState") == "PENDING", "requeue", cluster.logs, timeout=120
        )
    finally:
        cluster.run("scontrol", "update", "NodeName=node2", "State=RESUME")
    fields = cluster.finish(job, timeout=300, restarts=1)
    assert fields["JobState"] == "COMPLETED", run.text()
    assert "resumed from" in run.text()
    assert_whole(run, expected)


def test_a_cancelled_run_saves_first(run, cluster):
    job = run.submit("checkpoint.every=0")
    run.wait_for_step(5)
    cluster.run("scancel", job)
    fields = cluster.finish(job, timeout=300)
    assert fields["JobState"] == "CANCELLED"
    saved = [path.name for path in (run.folder / "checkpoints").glob("step-*")]
    assert len(saved) == 1, run.text()
    assert f"stopped after step {int(saved[0].removeprefix('step-'))}" in run.text()


def test_healthy_nodes_are_shown_and_train(run, cluster):
    job = run.submit("trainer.max_steps=6", tasks=2, TIDE_HEALTH="1")
    assert cluster.finish(job, timeout=300)["JobState"] == "COMPLETED", run.text()
    log = run.text()
    assert "4 ranks on 2 node(s) may train" in log
    assert "node1  0-1" in log and "node2  2-3" in log
    assert log.index("may train") < log.index("to train 6 steps")
    assert not list(run.root.glob(".health-*"))


SITE = """\
import os
if os.environ.get("SLURMD_NODENAME") == "node2":
    if os.environ["SICKNESS"] == "version":
        import importlib.metadata as metadata
        true = metadata.version
        metadata.version = lambda name: "0.0.1" if name == "deepspeed" else true(name)
    else:
        from pathlib import Path
        true_write = Path.write_text
        def write_text(self, *args, **kwargs):
            if self.name.startswith(".health-"):
                raise OSError(30, "Read-only file system")
            return true_write(self, *args, **kwargs)
        Path.write_text = write_text
"""


@pytest.mark.parametrize(
    ("sickness", "said"),
    [
        ("version", "sick: node2: deepspeed is 0.0.1, where 1 other has"),
        ("folder", "cannot be written: [Errno 30] Read-only file system"),
    ],
)
def test_a_sick_node_is_named_and_nothing_trains(run, cluster, sickness, said):
    site = run.root / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE)
    job = run.submit(TIDE_HEALTH="1", SICKNESS=sickness, PYTHONPATH=str(site))
    fields = cluster.finish(job, timeout=300)
    log = run.text()
    assert fields["ExitCode"] == "5:0", log
    assert said in log and "sick: node1" not in log
    assert "submit with --exclude=node2" in log
    assert not run.folder.exists()
