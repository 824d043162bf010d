"""SIGUSR1 before the processes of a job could save: the job comes back. No SLURM is needed to see it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

OUTCOME = Path(__file__).parents[2] / "slurm" / "outcome.sh"
SCONTROL = """\
#!/bin/sh
case "$*" in
    *show*) echo "JobId=7 JobState=RUNNING Restarts=0" ;;
    *) echo "$*" >>{asked} ;;
esac
"""
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")


@pytest.fixture
def job(tmp_path):
    """Run lines after outcome.sh as a job's shell would; exit status, log and what scontrol was asked for."""
    asked = tmp_path / "asked"
    (tmp_path / "scontrol").write_text(SCONTROL.format(asked=asked))
    (tmp_path / "scontrol").chmod(0o755)

    def run(lines):
        script = f'set -euo pipefail\n. "{OUTCOME}"\n{lines}\nfinish "$status"\n'
        environment = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "TIDE_RUN_NAME": "run",
        }
        done = subprocess.run(
            ["bash", "-c", script],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.stderr == ""
        return done.returncode, done.stdout, asked.read_text() if asked.exists() else ""

    return run


COMES_BACK = "Exit status 138: stopped before it could save; requeued (restart 1 of at most 100)."


def test_processes_that_have_no_handler_yet_are_ended_and_the_job_comes_back(job):
    # The command asks its shell for what SLURM would, and has not got as far as catching it.
    status, log, asked = job("""run_step bash -c 'kill -USR1 $PPID; exec sleep 60'""")
    assert (status, asked) == (138, "requeue 7\n")
    assert "SIGUSR1 came: passed on to the processes" in log and COMES_BACK in log


def test_nothing_is_started_after_the_signal(job, tmp_path):
    status, log, asked = job("kill -USR1 $$\nrun_step touch started")
    assert (status, asked) == (138, "requeue 7\n")
    assert "SIGUSR1 came while no process is running" in log and COMES_BACK in log
    assert not (tmp_path / "started").exists()


def test_a_check_that_ends_well_after_the_signal_is_not_followed_by_the_training(job, tmp_path):
    lines = """run_step bash -c "trap '' USR1; kill -USR1 \\$PPID"\nrun_step touch started"""
    status, log, asked = job(lines)
    assert (status, asked) == (138, "requeue 7\n"), log
    assert not (tmp_path / "started").exists()


def test_processes_that_save_are_waited_for(job):
    saves = """trap "exit 75" USR1; kill -USR1 $PPID; while :; do sleep 0.1; done"""
    status, log, asked = job(f"run_step bash -c '{saves}'")
    assert (status, asked) == (75, "requeue 7\n")
    assert "the run was stopped and is saved; requeued" in log


def test_a_process_that_fails_at_once_without_a_signal_does_not_come_back(job):
    status, log, asked = job("run_step bash -c 'exit 1'")
    assert (status, asked) == (1, "")
    assert "so soon that another start would probably fail" in log
