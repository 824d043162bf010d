"""The job scripts against a real SLURM, with an entry point that only writes down how it was started."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest

from tests.slurm.conftest import start_cluster
from tests.slurm.test_scripts import SCRIPTS

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slurm, pytest.mark.slow]

STUB = """\
import json, os, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
         "GLOO_SOCKET_IFNAME", "SLURM_RESTART_COUNT", "SLURM_JOB_END_TIME")
seen = {name: os.environ.get(name) for name in names} | {"argv": sys.argv[1:], "cwd": os.getcwd()}
if "fail" in sys.argv and os.environ["RANK"] == "1":
    sys.exit(7)
with open(f"seen-{os.environ['SLURM_JOB_ID']}-{os.environ['RANK']}.json", "w") as file:
    json.dump(seen, file)
print("started", os.environ["RANK"])
"""


@pytest.fixture
def home(tmp_path):
    """A checkout whose training entry point is the stub."""
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    (tmp_path / "tide_mega").mkdir()
    (tmp_path / "tide_mega" / "__init__.py").touch()
    (tmp_path / "tide_mega" / "train.py").write_text(STUB)
    return tmp_path


def submit(cluster, home, *words, cwd=None, **environment):
    """Submit; the ended job's fields, its log, and what each rank saw."""
    environment = {"TIDE_HEALTH": "0"} | environment
    done = cluster.run("sbatch", "--parsable", *words, cwd=cwd or home, **environment)
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()
    fields = cluster.finish(job, timeout=300)
    log = Path(fields["StdOut"]).read_text()
    seen = [json.loads(p.read_text()) for p in sorted(home.glob(f"seen-{job}-*.json"))]
    return job, fields, log, seen


ONE_NODE = ("--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=0")
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0")


@pytest.mark.parametrize(("shape", "local_ranks"), [(ONE_NODE, ["0", "1"]), (TWO_NODES, ["0", "0"])])
def test_ranks_rendezvous_and_overrides_reach_every_process(cluster, home, shape, local_ranks):
    job, fields, log, seen = submit(
        cluster, home, *shape, "slurm/tide_1b.sh", "memory=k16", "optim.lr=2e-4", "run.tag=a b"
    )
    assert fields["JobState"] == "COMPLETED", log
    assert [s["RANK"] for s in seen] == ["0", "1"]
    assert [s["LOCAL_RANK"] for s in seen] == local_ranks
    assert {s["WORLD_SIZE"] for s in seen} == {"2"}
    assert {s["LOCAL_WORLD_SIZE"] for s in seen} == {str(len(set(local_ranks)))}
    assert {s["MASTER_ADDR"] for s in seen} == {"127.0.0.1"}
    assert {s["GLOO_SOCKET_IFNAME"] for s in seen} == {"lo"}
    assert len({s["MASTER_PORT"] for s in seen}) == 1 and 20000 <= int(seen[0]["MASTER_PORT"]) < 32000
    assert {s["cwd"] for s in seen} == {str(home)}
    for s in seen:
        assert s["argv"] == [
            "experiment=demo_tide",
            "cluster=local",
            f"run.name=demo_tide-{job}",
            "memory=k16",
            "optim.lr=2e-4",
            "run.tag=a b",
        ]
    assert "running experiment=demo_tide in place of tide_8e_1b" in log


def test_the_baselines_script_runs_the_demo_baseline_and_takes_a_run_name(cluster, home):
    *_, seen = submit(cluster, home, *ONE_NODE, "slurm/base_1b.sh", TIDE_RUN_NAME="mine")
    assert seen[0]["argv"] == ["experiment=demo_base", "cluster=local", "run.name=mine"]


def test_the_checkout_is_found_from_elsewhere_by_tide_home(cluster, home, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    script = str(home / "slurm" / "tide_1b.sh")
    _, fields, log, _ = submit(cluster, home, *ONE_NODE, script, cwd=elsewhere)
    assert fields["ExitCode"] == "2:0"
    assert f"No {elsewhere}/slurm/body.sh: call sbatch in the checkout's folder or set TIDE_HOME." in log
    _, fields, log, seen = submit(cluster, home, *ONE_NODE, script, cwd=elsewhere, TIDE_HOME=str(home))
    assert fields["JobState"] == "COMPLETED", log
    assert seen[0]["cwd"] == str(home)


def test_a_failing_process_fails_the_job(cluster, home):
    _, fields, log, _ = submit(cluster, home, *ONE_NODE, "slurm/tide_1b.sh", "fail")
    assert fields["JobState"] == "FAILED"
    assert fields["ExitCode"] == "7:0", log


def test_a_missing_environment_is_named(cluster, home):
    _, fields, log, _ = submit(cluster, home, *ONE_NODE, "slurm/tide_1b.sh", TIDE_VENV="/no/such/venv")
    assert fields["ExitCode"] == "2:0"
    assert "TIDE_VENV=/no/such/venv has no bin/python" in log


def fake_smi(folder, *names):
    folder.mkdir()
    (folder / "nvidia-smi").write_text("#!/bin/bash\n" + "".join(f"echo {name}\n" for name in names))
    (folder / "nvidia-smi").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("gpu", "profile"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GH200 480GB", "local"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA A100", "local"),
    ],
)
def test_with_gpus_the_named_experiment_runs_with_their_profile(cluster, home, tmp_path, gpu, profile):
    path = fake_smi(tmp_path / "bin", gpu, gpu)
    _, fields, log, seen = submit(cluster, home, *ONE_NODE, "slurm/tide_1b.sh", PATH=path)
    assert fields["JobState"] == "COMPLETED", log
    assert seen[0]["argv"][:2] == ["experiment=tide_8e_1b", f"cluster={profile}"]


def test_more_tasks_than_gpus_are_refused(cluster, home, tmp_path):
    path = fake_smi(tmp_path / "bin", "NVIDIA H100")
    _, fields, log, _ = submit(cluster, home, *ONE_NODE, "slurm/tide_1b.sh", PATH=path)
    assert fields["ExitCode"] == "2:0"
    assert "2 tasks on a node with 1 GPU(s): submit with --ntasks-per-node=1" in log


def test_a_container_gets_image_mounts_and_folder(cluster, home, tmp_path):
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "srun"
    fake.write_text("#!/bin/bash\nprintf '%s\\n' \"$@\"\n")
    fake.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    _, fields, log, _ = submit(
        cluster,
        home,
        *ONE_NODE,
        "slurm/tide_1b.sh",
        PATH=path,
        TIDE_CONTAINER="tide.sqsh",
        TIDE_MOUNTS="/a:/b",
    )
    assert fields["JobState"] == "COMPLETED", log
    lines = log.splitlines()
    assert "--container-image=tide.sqsh" in lines
    assert f"--container-mounts={home}:{home},/a:/b" in lines


def test_a_requeued_job_keeps_its_run_folder_and_log(cluster, home):
    job, first, _, before = submit(cluster, home, *ONE_NODE, "slurm/tide_1b.sh")
    assert cluster.run("scontrol", "requeue", job).returncode == 0
    cluster.finish(job, timeout=300, restarts=1)
    after = [json.loads(p.read_text()) for p in sorted(home.glob(f"seen-{job}-*.json"))]
    assert after[0]["SLURM_RESTART_COUNT"] == "1"
    assert before[0]["argv"] == after[0]["argv"]
    assert before[0]["MASTER_PORT"] != after[0]["MASTER_PORT"]
    assert Path(first["StdOut"]).read_text().count("started 0") == 2


def test_a_job_gets_its_nodes_whole_memory_and_a_limit_the_queue_accepts(cluster, home):
    _, fields, log, _ = submit(cluster, home, *TWO_NODES, "slurm/tide_1b.sh")
    assert fields["TimeLimit"] == "1-00:00:00", log
    assert "mem=4000M" in fields["TRES"], "twice a node's 2000 MB"


def test_the_time_limit_is_known_to_the_training(cluster, home):
    before = time.time()
    *_, seen = submit(cluster, home, *ONE_NODE, "--time=7", "slurm/tide_1b.sh")
    assert before + 7 * 60 <= int(seen[0]["SLURM_JOB_END_TIME"]) + 1 <= time.time() + 7 * 60 + 1


def test_slurm_would_take_every_script_as_it_stands(tmp_path):
    with start_cluster(tmp_path / "large", nodes=16, cpus=8, gpus=8) as large:
        for script in SCRIPTS:
            done = large.run("sbatch", "--test-only", f"slurm/{script.name}", "optim.lr=2e-4")
            assert done.returncode == 0, f"{script.name}: {done.stderr}"
            nodes = re.search(r"^#SBATCH --nodes=(\d+)$", script.read_text(), flags=re.M)[1]
            assert f"using {8 * int(nodes)} processors" in done.stderr


def test_outside_slurm_the_body_says_what_to_do(cluster):
    done = cluster.run("bash", "slurm/tide_1b.sh")
    assert done.returncode == 2
    assert "submit it with sbatch" in done.stderr
