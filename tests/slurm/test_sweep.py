"""A sweep through Hydra's submitit launcher: one array of jobs, a run folder for each."""

import os
import sys
from pathlib import Path

import pytest

from tests.support.runs import TINY
from tide_mega.config.hydra_door import from_yaml
from tide_mega.errors import Exit
from tide_mega.metrics.jsonl import read_metrics

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_each_point_of_a_sweep_is_a_job_with_a_run_folder(cluster, tiny_data, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="extra sweep")
    done = cluster.run(
        *(sys.executable, "-m", "tide_mega.train", "--multirun", "hydra/launcher=slurm", *TINY),
        *(f"data.path={tiny_data}", f"run.root={tmp_path}", f"hydra.sweep.dir={tmp_path}/sweep"),
        *("trainer.max_steps=3", "trainer.eval_every=0", "logging.every=1", "optim.warmup_steps=1"),
        *("hydra.launcher.tasks_per_node=2", "hydra.launcher.timeout_min=5"),
        *("optim.lr=1e-3,-1,3e-4", "run.name=lr-${optim.lr}"),
        OMP_NUM_THREADS="1",
        TMPDIR=os.environ.get("TMPDIR", "/tmp"),
    )
    logs = "\n".join(p.read_text()[-2000:] for p in tmp_path.glob("sweep/.submitit/**/*_log.*"))
    assert done.returncode == Exit.SWEEP, done.stderr + logs
    assert "Sweep: 2 of 3 points done, 1 failed" in done.stderr
    assert "  #1 optim.lr=-1: status 2, optim.lr=-1.0 is not positive: give a number above 0." in done.stderr
    assert list(tmp_path.glob("sweep/.sweep-*")) == []
    for lr in (0.001, 0.0003):
        run = tmp_path / f"lr-{lr}"
        assert from_yaml((run / "config.yaml").read_text()).optim.lr == lr
        assert [r["step"] for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "train"] == [1, 2, 3]
        assert '"world_size": 2' in (run / "environment.json").read_text()
    jobs = {p.name.split("_")[0] for p in tmp_path.glob("sweep/.submitit/*") if p.name[0].isdigit()}
    assert len(jobs) == 1, "one array"
