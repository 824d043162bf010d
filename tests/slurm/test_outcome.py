"""What follows a job's end, on a real SLURM, with an entry point that ends as its arguments say."""

import re
import shutil
from pathlib import Path

import pytest

from tests.slurm.conftest import wait_until
from tide_mega.errors import Exit

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slurm, pytest.mark.slow]

STUB = """\
import os, signal, sys, time
restart = int(os.environ.get("SLURM_RESTART_COUNT", 0))
words = dict(word.split("=", 1) for word in sys.argv[1:])
if "wait" in words and restart == 0:
    def stop(number, frame):
        print("caught", signal.Signals(number).name, flush=True)
        time.sleep(1.0 * (os.environ["RANK"] == "0"))  # ranks do not end together
        sys.exit(75)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, stop)
    print("waiting", flush=True)
    signal.pause()
if "alone" in words and os.environ["RANK"] == "0":
    time.sleep(600)
statuses = words.get("status", "0").split("/")
print("start", restart, words["run.name"], flush=True)
sys.exit(int(statuses[min(restart, len(statuses) - 1)]))
"""
ONE_TASK = ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=0")
TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0")


@pytest.fixture
def home(tmp_path):
    """A checkout whose training entry point is the stub."""
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    (tmp_path / "tide_mega").mkdir()
    (tmp_path / "tide_mega" / "__init__.py").touch()
    (tmp_path / "tide_mega" / "train.py").write_text(STUB)
    return tmp_path


@pytest.fixture
def submit(cluster, home):
    """Submit a job; its number."""

    def submit(*words, **environment):
        environment = {"TIDE_HEALTH": "0", "TIDE_RUN_NAME": "run"} | environment
        done = cluster.run("sbatch", "--parsable", f"--output={home}/log", *words, cwd=home, **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return submit


def test_a_stopped_job_is_requeued_until_it_is_complete(cluster, home, submit):
    job = submit(*ONE_TASK, "slurm/tide_1b.sh", "status=75/0")
    fields = cluster.finish(job, timeout=300, restarts=1)
    log = (home / "log").read_text()
    assert fields["JobState"] == "COMPLETED", log
    assert [line for line in log.splitlines() if line.startswith("start")] == [
        "start 0 run",
        "start 1 run",
    ]
    assert "the run was stopped and is saved; requeued (restart 1 of at most 100)" in log


def test_restarts_are_limited(cluster, home, submit):
    job = submit(*ONE_TASK, "slurm/tide_1b.sh", "status=75", TIDE_MAX_RESTARTS="1")
    fields = cluster.finish(job, timeout=300, restarts=1)
    assert fields["ExitCode"] == "75:0"
    assert "started again 1 times: not requeued (TIDE_MAX_RESTARTS=1)" in (home / "log").read_text()


def test_where_requeue_is_not_allowed_the_log_says_how_to_go_on(cluster, home, submit):
    job = submit(*ONE_TASK, "--no-requeue", "slurm/tide_1b.sh", "status=75")
    fields = cluster.finish(job, timeout=300)
    log = (home / "log").read_text()
    assert fields["ExitCode"] == "75:0"
    assert (
        "SLURM does not requeue the job" in log
        and "TIDE_RUN_NAME=run with the same sbatch continues it" in log
    )


@pytest.mark.parametrize(
    "status", sorted(set(Exit) - {Exit.STOPPED, Exit.HUNG} - {Exit.DONE, Exit.ERROR, Exit.CHECKPOINT})
)
def test_what_would_end_the_same_way_is_not_requeued(cluster, home, submit, status):
    job = submit(*ONE_TASK, "slurm/tide_1b.sh", f"status={status:d}", TIDE_CRASH_MINUTES="0")
    fields = cluster.finish(job, timeout=300)
    assert fields["ExitCode"] == f"{status:d}:0"
    assert f"Exit status {status:d}: " in (home / "log").read_text()


@pytest.mark.parametrize("status", [int(Exit.HUNG), int(Exit.ERROR), int(Exit.CHECKPOINT), 137])
def test_a_failure_is_requeued_unless_it_came_at_once(cluster, home, submit, status):
    words = (*ONE_TASK, "slurm/tide_1b.sh", f"status={status}/0")
    fields = cluster.finish(submit(*words), timeout=300)
    assert fields["ExitCode"].startswith(f"{status}:")
    assert "so soon that another start would probably fail" in (home / "log").read_text()
    if status == Exit.HUNG:
        fields = cluster.finish(submit(*words, TIDE_CRASH_MINUTES="0"), timeout=300, restarts=1)
        assert fields["JobState"] == "COMPLETED"


def test_a_process_that_fails_alone_ends_the_job(cluster, home, submit):
    words = (
        "--nodes=1",
        "--ntasks-per-node=2",
        "--gpus-per-node=0",
        "slurm/tide_1b.sh",
        "status=1",
        "alone=1",
    )
    fields = cluster.finish(submit(*words, TIDE_WAIT_SECONDS="1"), timeout=300)
    assert fields["JobState"] == "FAILED"
    assert "the run failed" in (home / "log").read_text()


def wait_for(cluster, path, text, count=1):
    wait_until(lambda: path.exists() and path.read_text().count(text) >= count, text, cluster.logs)


def test_a_signal_to_the_batch_shell_reaches_every_task_and_the_job_comes_back(cluster, home, submit):
    job = submit(*TWO_BY_TWO, "slurm/tide_1b.sh", "wait=1")
    wait_for(cluster, home / "log", "waiting", 4)
    assert cluster.run("scancel", "--batch", "--signal=USR1", job).returncode == 0
    fields = cluster.finish(job, timeout=300, restarts=1)
    log = (home / "log").read_text()
    assert fields["JobState"] == "COMPLETED", log
    assert log.count("caught SIGUSR1") == 4
    assert "Exit status 75" in log and log.count("start 1 run") == 4


def test_a_cancelled_job_may_save_and_stays_cancelled(cluster, home, submit):
    job = submit(*TWO_BY_TWO, "slurm/tide_1b.sh", "wait=1")
    wait_for(cluster, home / "log", "waiting", 4)
    cluster.run("scancel", job)
    fields = cluster.finish(job, timeout=300)
    log = (home / "log").read_text()
    assert fields["JobState"] == "CANCELLED" and fields["Restarts"] == "0"
    assert log.count("caught SIGTERM") == 4, log
    assert "SLURM itself is ending the job" in log


def chain(cluster, home, *words, **environment):
    done = cluster.run("slurm/chain.sh", *words, cwd=home, TIDE_HEALTH="0", **environment)
    assert done.returncode == 0, done.stderr
    return [line.split()[-1] for line in done.stdout.splitlines() if line.startswith("link")], done.stdout


def test_a_chain_goes_on_in_the_next_job_and_drops_what_is_not_needed(cluster, home):
    # The links are other jobs, none of them restarted: the run's progress is in a file.
    (home / "tide_mega" / "train.py").write_text(
        "import os, sys\nn = len(open('done').read()) if os.path.exists('done') else 0\n"
        "open('done', 'a').write('.')\nprint('start', n, os.environ['SLURM_JOB_ID'], sys.argv[3], flush=True)\n"
        "sys.exit(75 if n == 0 else 0)\n"
    )
    jobs, said = chain(cluster, home, "4", *ONE_TASK, "slurm/tide_1b.sh", TIDE_RUN_NAME="long")
    assert "run long, log long.log" in said
    states = [cluster.finish(job, timeout=300)["JobState"] for job in jobs]
    log = (home / "long.log").read_text()
    assert states == ["FAILED", "COMPLETED", "CANCELLED", "CANCELLED"], log
    assert f"start 0 {jobs[0]} run.name=long" in log and f"start 1 {jobs[1]} run.name=long" in log
    assert re.search(r"the next link of chain long-\w{8} continues it", log)
    assert re.search(rf"Links {jobs[2]} {jobs[3]} of chain long-\w{{8}} have nothing to do: cancelled", log)


def test_the_last_link_says_how_to_go_on(cluster, home):
    jobs, _ = chain(cluster, home, "1", *ONE_TASK, "slurm/tide_1b.sh", "status=75", TIDE_RUN_NAME="long")
    assert cluster.finish(jobs[0], timeout=300)["ExitCode"] == "75:0"
    said = r"this was the last link of chain long-\w{8}: TIDE_RUN_NAME=long with slurm/chain\.sh"
    assert re.search(said, (home / "long.log").read_text())


@pytest.mark.parametrize("words", [[], ["x", "slurm/tide_1b.sh"], ["2"], ["2", "slurm/none.sh"]])
def test_a_chain_without_number_or_script_is_refused(cluster, home, words):
    done = cluster.run("slurm/chain.sh", *words, cwd=home)
    assert done.returncode == 2 and "Usage: " in done.stderr
