"""Chains of jobs on a queue that others use too; SLURM's commands are scripts here."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SLURM = Path(__file__).parents[2] / "slurm"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")

QUEUE = """\
11 ours tide-chain:long
12 ours tide-chain:long
13 ours tide-chain:long 2
14 ours tide-chain:a long
15 ours x tide-chain:long
16 ours (null)
21 theirs tide-chain:long
22 theirs tide-chain:long 2
"""
"""Number, user and comment of the jobs that wait."""

COMMANDS = {
    # Everyone's jobs, unless it is asked for one's own.
    "squeue": """echo "squeue $*" >>asked
if [ -n "${QUEUE_DENIED:-}" ]; then echo "slurm_load_jobs error: Access denied" >&2; exit 1; fi
case " $* " in *" --me "*) whose=ours ;; *) whose='[a-z]*' ;; esac
sed -n "s/^\\([0-9]*\\) $whose /\\1 /p" queue""",
    "scancel": """echo "scancel $*" >>asked
if [ -n "${CANCEL_DENIED:-}" ]; then echo "scancel: error: Access denied" >&2; exit 1; fi""",
    "scontrol": """case "$*" in *hostnames*) echo node1; echo node2; exit ;; esac
if [ -n "${SHOW_DENIED:-}" ]; then echo "Access denied" >&2; exit 1; fi
case "$*" in
    *"show job"*) echo "JobId=7 JobName=x JobState=RUNNING Restarts=0 EndTime=Unknown" ;;
    *) echo "scontrol $*" >>asked ;;
esac""",
    "srun": 'echo "rendezvous at $MASTER_ADDR, ends at <$SLURM_JOB_END_TIME>"',
    "sbatch": """printf '%s\\n' "$TIDE_CHAIN" >>chains
printf '%s|' "$@" >>submitted; echo >>submitted
if [ "$(wc -l <submitted)" -gt "${QUEUE_TAKES:-9}" ]; then echo QOSMaxSubmitJobPerUserLimit >&2; exit 1; fi
echo "10$(wc -l <submitted);test" """,
}


@pytest.fixture
def shell(tmp_path):
    """Run bash where SLURM's commands are scripts; the process that ended, and what they were asked for."""
    (tmp_path / "bin").mkdir()
    for name, text in COMMANDS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "queue").write_text(QUEUE)
    (tmp_path / "job.sh").touch()

    def run(*words, **environment):
        names = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
        done = subprocess.run(
            ["bash", *words],
            env=names | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        return done, [line for line in read(tmp_path / "asked") if line.startswith(("scancel", "scontrol"))]

    return run


def read(path):
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def end(shell):
    """End a link of a chain with a status, as a job's shell would."""

    def run(status, chain, **environment):
        script = f'set -euo pipefail\n. "{SLURM}/outcome.sh"\nstatus={status}\nfinish "$status"\n'
        return shell("-c", script, TIDE_CHAIN=chain, TIDE_RUN_NAME="run", **environment)

    return run


@pytest.mark.parametrize(
    ("chain", "links"), [("long", ["11", "12"]), ("long 2", ["13"]), ("a long", ["14"]), ("lon", [])]
)
@pytest.mark.parametrize("status", [0, 3])
def test_a_link_that_needs_no_other_cancels_its_own_users_links_of_its_own_chain_alone(
    end, status, chain, links
):
    done, asked = end(status, chain)
    assert done.returncode == status and done.stderr == ""
    assert asked == ([f"scancel --me --state=PENDING {' '.join(links)}"] if links else [])
    assert (f"Links {' '.join(links)} of chain {chain} have nothing to do: cancelled" in done.stdout) == bool(
        links
    )


@pytest.mark.parametrize(("chain", "waits"), [("long", True), ("long 2", True), ("lone", False)])
def test_a_stopped_link_is_continued_by_a_link_of_its_own_chain_alone(end, tmp_path, chain, waits):
    if not waits:  # another user's chain of this very name is no help
        (tmp_path / "queue").write_text("31 theirs tide-chain:lone\n")
    done, asked = end(75, chain)
    assert done.returncode == 75 and asked == []
    assert (f"the next link of chain {chain} continues it" in done.stdout) is waits
    assert (f"this was the last link of chain {chain}" in done.stdout) is not waits


@pytest.mark.parametrize("status", [0, 4])
def test_a_job_keeps_its_status_where_a_cancel_is_denied(end, status):
    done, _ = end(status, "long", CANCEL_DENIED="1")
    assert done.returncode == status and done.stderr == ""
    assert "SLURM does not cancel them all (scancel: error: Access denied)" in done.stdout
    assert "scancel --me 11 12" in done.stdout


@pytest.mark.parametrize("status", [0, 75])
def test_a_job_keeps_its_status_where_the_queue_is_not_shown(end, status):
    done, asked = end(status, "long", QUEUE_DENIED="1")
    assert done.returncode == status and done.stderr == "" and asked == []
    assert "squeue did not say" in done.stdout
    assert "last link" not in done.stdout


@pytest.mark.parametrize("status", [0, 2, 75])
def test_a_job_keeps_its_status_where_slurm_does_not_show_it(end, status):
    done, _ = end(status, "", SHOW_DENIED="1")
    assert done.returncode == status and done.stderr == ""


def test_without_an_answer_there_is_no_field(shell):
    ask = f'set -euo pipefail; . "{SLURM}/outcome.sh"; echo "<$(job_field JobState)><$(job_field Absent)>"'
    assert shell("-c", ask)[0].stdout == "<RUNNING><>\n"
    assert shell("-c", ask, SHOW_DENIED="1")[0].stdout == "<><>\n"


def test_a_job_starts_where_slurm_shows_neither_it_nor_its_nodes_and_not_under_a_name_no_folder_has(
    shell, tmp_path
):
    for file in ("tide_mega/train.py", "conf/config.yaml"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).touch()
    (tmp_path / "slurm").symlink_to(SLURM)
    job = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "2"}
    job |= {"SLURM_TASKS_PER_NODE": "1(x2)", "SLURM_SUBMIT_DIR": str(tmp_path), "TIDE_HEALTH": "0"}
    script = f'EXPERIMENT=demo_tide; . "{SLURM}/body.sh"'
    done, _ = shell("-c", script, SHOW_DENIED="1", **job)
    assert done.returncode == 0 and done.stderr == ""
    assert "rendezvous at node1, ends at <>" in done.stdout
    done, _ = shell("-c", script, TIDE_RUN_NAME="a\x1b[2Jb", **job)
    assert done.returncode == 2 and "\x1b" not in done.stdout + done.stderr
    assert "cannot be a folder's name" in done.stderr and "rendezvous" not in done.stdout


def start(shell, tmp_path, *words, **environment):
    """Start a chain; the process that ended, and the arguments of each sbatch."""
    done, _ = shell(str(SLURM / "chain.sh"), *words, **environment)
    return done, [line.split("|")[:-1] for line in read(tmp_path / "submitted")]


def test_every_chain_has_a_mark_of_its_own(shell, tmp_path):
    for _ in range(2):
        done, submitted = start(
            shell, tmp_path, "2", "--time=5", "job.sh", "a=b c", TIDE_RUN_NAME="a 50% run"
        )
        assert done.returncode == 0, done.stderr
        assert "run a 50% run, log a 50% run.log" in done.stdout
    marks = [word for words in submitted for word in words if word.startswith("--comment=")]
    assert marks == [f"--comment=tide-chain:{chain}" for chain in read(tmp_path / "chains")]
    assert marks[0] == marks[1] != marks[2] == marks[3]
    assert all(re.fullmatch(r"--comment=tide-chain:a 50% run-[0-9a-f]{8}", mark) for mark in marks)
    assert submitted[1] == [
        *("--parsable", marks[0], "--output=a 50%% run.log", "--dependency=afterany:101"),
        *("--time=5", "job.sh", "a=b c"),
    ]


def test_a_link_that_slurm_does_not_take_is_named(shell, tmp_path):
    done, submitted = start(shell, tmp_path, "3", "job.sh", QUEUE_TAKES="1")
    assert done.returncode == 1 and len(submitted) == 2
    assert "QOSMaxSubmitJobPerUserLimit" in done.stderr and "SLURM did not take link 2 of 3" in done.stderr
    assert "link 1 of 3: job 101" in done.stdout


@pytest.mark.parametrize("name", ["a/b", "a\\b", "a\nb", "a\x1b[2Jb", "  ", ".", ".."])
def test_a_name_that_no_folder_can_have_is_refused_before_anything_is_queued(shell, tmp_path, name):
    done, submitted = start(shell, tmp_path, "2", "job.sh", TIDE_RUN_NAME=name)
    assert done.returncode == 2 and submitted == []
    assert "cannot be a folder's name" in done.stderr
    assert done.stderr.count("\n") == 1 and "\x1b" not in done.stderr


def test_the_comment_is_the_chains(shell, tmp_path):
    done, submitted = start(shell, tmp_path, "2", "--comment=mine", "job.sh")
    assert done.returncode == 2 and submitted == []
    assert "--comment=mine: the comment marks the links of a chain" in done.stderr
