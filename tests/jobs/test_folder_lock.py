"""One process at a time in a folder, and no lock that needs a person."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tide_mega.errors import ConfigError, Exit
from tide_mega.jobs import lock as folder_lock
from tide_mega.jobs import lock as holder
from tide_mega.jobs.lock import (
    LOCK_FILE,
    SILENCE,
    SILENCE_OF_ENDED_JOB,
    FolderLock,
    FolderTakenError,
    Holder,
    JobState,
    job_state,
    release_held,
    started_at,
)

ELSEWHERE = Holder(
    token="their5",
    work="a training",
    host="node7",
    pid=4711,
    since="2026-01-01 00:00:00 +0000",
    machine="another boot",
    started=1,
    job="81",
    cluster="big",
)


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)


def never(_):
    raise AssertionError("it must not wait")


def lock_of(folder, **changes):
    return FolderLock(folder, "a training", key="run.name", **{"sleep": never, "ask_slurm": never, **changes})


def left_by(folder, who, age=0.0):
    folder.mkdir(exist_ok=True)
    path = folder / LOCK_FILE
    path.write_bytes(who.dump())
    now = path.stat().st_mtime
    os.utime(path, (now - age, now - age))
    return path


class Waiting:
    """Passes time for the lock that waits, and does something at each pause."""

    def __init__(self, monkeypatch, path, at_pause=lambda: None):
        self.passed, self.at_pause = 0.0, at_pause
        written = path.stat().st_mtime
        monkeypatch.setattr(FolderLock, "_now", lambda _: written + self.passed)

    def __call__(self, seconds):
        self.passed += seconds
        self.at_pause()


def test_the_second_is_refused_with_host_process_and_job_of_the_first(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1234")
    with lock_of(tmp_path / "runs" / "a"):
        with pytest.raises(FolderTakenError) as info, lock_of(tmp_path / "runs" / "a"):
            pass
        assert [path.name for path in (tmp_path / "runs" / "a").iterdir()] == [LOCK_FILE]
    said = str(info.value)
    for part in ("runs/a is in use by a training", os.uname().nodename, str(os.getpid()), "SLURM job 1234"):
        assert part in said
    assert info.value.exit_status == Exit.TAKEN == 7
    assert list((tmp_path / "runs" / "a").iterdir()) == []
    with lock_of(tmp_path / "runs" / "a"):
        pass


def test_it_is_given_back_however_the_work_ends(tmp_path):
    for error in (KeyboardInterrupt, ZeroDivisionError, SystemExit):
        with pytest.raises(error), lock_of(tmp_path):
            raise error
        assert list(tmp_path.iterdir()) == []


def test_what_ends_a_process_at_once_gives_it_back_first(tmp_path):
    lock_of(tmp_path).__enter__()
    release_held(seconds=30)
    assert list(tmp_path.iterdir()) == []


HOLDS = """
import sys, pathlib
from tide_mega.jobs.lock import FolderLock
with FolderLock(pathlib.Path(sys.argv[1]), "a training", key="run.name"):
    print("holds", flush=True)
    sys.stdin.read()
"""


def test_a_killed_process_of_this_machine_leaves_nothing_to_do(tmp_path, caplog):
    first = subprocess.Popen(
        [sys.executable, "-c", HOLDS, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout.readline() == "holds\n"
    with pytest.raises(FolderTakenError, match=f"process {first.pid} "), lock_of(tmp_path):
        pass
    os.kill(first.pid, signal.SIGKILL)
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet gone
    with lock_of(tmp_path):
        assert f"process {first.pid} " in caplog.text and "taken over" in caplog.text
    first.communicate()


def test_a_process_number_that_is_used_again_is_another_process(tmp_path):
    left_by(tmp_path, replace(Holder.this_process("a training"), started=started_at(os.getpid()) - 1))
    with lock_of(tmp_path):
        pass


def test_a_process_that_may_not_be_seen_is_not_taken_for_dead(tmp_path, monkeypatch):
    path = left_by(tmp_path, replace(Holder.this_process("a training"), pid=1))
    monkeypatch.setattr(holder, "started_at", lambda pid: holder._HIDDEN)
    waiting = Waiting(monkeypatch, path, at_pause=lambda: os.utime(path, (1, 1)))
    with pytest.raises(FolderTakenError), lock_of(tmp_path, sleep=waiting):
        pass


def test_a_holder_elsewhere_that_gives_a_sign_is_alive(tmp_path, monkeypatch):
    path = left_by(tmp_path, ELSEWHERE, age=20)
    beats = iter([0, 0, 1])
    waiting = Waiting(monkeypatch, path, at_pause=lambda: next(beats) and os.utime(path))
    with pytest.raises(FolderTakenError, match="process 4711 on node7, SLURM job 81"):
        lock_of(tmp_path, sleep=waiting, ask_slurm=lambda job: JobState.UNKNOWN).__enter__()
    assert waiting.passed < SILENCE


@pytest.mark.parametrize("answer", [JobState.UNKNOWN, JobState.RUNNING])
def test_a_holder_elsewhere_that_is_silent_is_dead_after_the_stated_time(tmp_path, monkeypatch, answer):
    waiting = Waiting(monkeypatch, left_by(tmp_path, ELSEWHERE))
    with lock_of(tmp_path, sleep=waiting, ask_slurm=lambda job: answer):
        assert waiting.passed == SILENCE
    left_by(tmp_path, ELSEWHERE, age=SILENCE)
    monkeypatch.undo()
    with lock_of(tmp_path, ask_slurm=lambda job: answer):
        pass


def test_a_job_that_has_left_the_queue_need_not_be_waited_for_as_long(tmp_path, monkeypatch):
    waiting, asked = Waiting(monkeypatch, left_by(tmp_path, ELSEWHERE)), []
    with lock_of(tmp_path, sleep=waiting, ask_slurm=lambda job: asked.append(job) or JobState.ENDED):
        assert waiting.passed == SILENCE_OF_ENDED_JOB < SILENCE
    assert set(asked) == {"81"}


def test_a_suspended_job_is_silent_and_alive(tmp_path):
    left_by(tmp_path, ELSEWHERE, age=SILENCE + 10)
    with pytest.raises(FolderTakenError, match="SLURM job 81"):
        lock_of(tmp_path, ask_slurm=lambda job: JobState.SUSPENDED).__enter__()


def test_another_clusters_queue_is_not_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "small")
    waiting = Waiting(monkeypatch, left_by(tmp_path, ELSEWHERE))
    with lock_of(tmp_path, sleep=waiting, ask_slurm=never):
        assert waiting.passed == SILENCE


def test_a_job_that_was_started_again_on_another_node_goes_on_at_once(tmp_path, monkeypatch):
    left_by(tmp_path, ELSEWHERE)
    for name, value in (("JOB_ID", "81"), ("CLUSTER_NAME", "big"), ("RESTART_COUNT", "1")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    with lock_of(tmp_path) as lock:
        assert (lock.me.job, lock.me.restarts) == ("81", 1)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"token": "x"}'])
def test_a_lock_that_cannot_be_read_is_somebodys_until_it_is_silent(tmp_path, monkeypatch, content):
    (tmp_path / LOCK_FILE).write_bytes(content)
    waiting = Waiting(monkeypatch, tmp_path / LOCK_FILE)
    with lock_of(tmp_path, sleep=waiting):
        assert waiting.passed == SILENCE


@pytest.mark.parametrize("has_links", [True, False])
def test_of_many_that_take_over_at_once_one_gets_it(tmp_path, monkeypatch, has_links):
    if not has_links:

        def refuse(*_):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    left_by(tmp_path, ELSEWHERE, age=SILENCE + 1)
    barrier, done, outcomes = threading.Barrier(8), threading.Barrier(8), []

    def start():
        lock = lock_of(tmp_path, sleep=lambda _: None, ask_slurm=lambda job: JobState.UNKNOWN)
        barrier.wait()
        try:
            lock.__enter__()
        except FolderTakenError as error:
            outcomes.append(error)
        else:
            outcomes.append(json.loads((tmp_path / LOCK_FILE).read_text())["token"] == lock.me.token)
        done.wait()
        lock.release()

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count(True) == 1, outcomes
    assert sum(isinstance(outcome, FolderTakenError) for outcome in outcomes) == 7
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_lock_that_changed_hands_meanwhile_is_left_alone(tmp_path, monkeypatch):
    path = left_by(tmp_path, ELSEWHERE, age=SILENCE + 1)
    create, me = FolderLock._create, Holder.this_process("a training")

    def late(self, target):
        if ".after-" in target.name:
            path.write_bytes(me.dump())  # another has taken over since this one looked
        return create(self, target)

    monkeypatch.setattr(FolderLock, "_create", late)
    with pytest.raises(FolderTakenError, match=f"process {os.getpid()} "):
        lock_of(tmp_path, ask_slurm=lambda job: JobState.UNKNOWN).__enter__()
    assert path.read_bytes() == me.dump()
    assert [other.name for other in tmp_path.iterdir()] == [LOCK_FILE]


def test_a_claim_whose_process_died_is_put_away(tmp_path):
    left_by(tmp_path, ELSEWHERE, age=SILENCE + 1)
    dead = replace(Holder.this_process("a training"), started=1)
    (tmp_path / f".{LOCK_FILE}.after-{ELSEWHERE.token}").write_bytes(dead.dump())
    old = tmp_path / f".{LOCK_FILE}.0123"
    old.write_bytes(b"")
    os.utime(old, (1, 1))
    with lock_of(tmp_path, ask_slurm=lambda job: JobState.UNKNOWN):
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]


def test_the_holder_gives_signs_and_knows_when_it_has_lost_the_folder(tmp_path):
    lost = []
    with lock_of(tmp_path, on_loss=lost.append) as lock:
        os.utime(lock.path, (1, 1))
        lock.beat()
        assert lock.path.stat().st_mtime > 1
        lock.path.unlink()
        lock.beat()  # a file that somebody removed comes back
        assert json.loads(lock.path.read_text()) == asdict(lock.me)
        lock.path.write_bytes(b"\0\0")
        lock.beat()  # so does its content
        assert json.loads(lock.path.read_text()) == asdict(lock.me)
        lock.path.write_bytes(ELSEWHERE.dump())
        assert not lost
        lock.beat()
        assert "process 4711 on node7" in lost[0]
    assert lock.path.read_bytes() == ELSEWHERE.dump(), "what is another's is not removed"


def test_signs_come_without_being_asked_for_and_end_with_the_lock(tmp_path, monkeypatch):
    beaten = threading.Event()
    monkeypatch.setattr(folder_lock, "BEAT_SECONDS", 0.001)
    monkeypatch.setattr(FolderLock, "beat", lambda lock: beaten.set())
    with lock_of(tmp_path):
        assert beaten.wait(60)
    assert "folder-lock" not in {thread.name for thread in threading.enumerate()}


def test_a_process_that_has_lost_its_folder_ends_with_the_status(monkeypatch):
    left = []
    monkeypatch.setattr(folder_lock.os, "_exit", left.append)
    folder_lock._end_at_once("gone")
    assert left == [Exit.TAKEN]


def test_a_folder_that_cannot_be_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "a", tmp_path / ("x" * 300)):
        with pytest.raises(ConfigError, match=r"run.name=.* cannot be written \(.*\): give another folder"):
            lock_of(folder).__enter__()


@pytest.mark.parametrize(
    ("script", "answer"),
    [
        ("echo RUNNING", JobState.RUNNING),
        ("echo COMPLETING", JobState.RUNNING),
        ("echo SUSPENDED", JobState.SUSPENDED),
        ("echo PENDING", JobState.ENDED),
        ("true", JobState.ENDED),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", JobState.ENDED),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", JobState.UNKNOWN),
    ],
)
def test_what_slurm_answers(tmp_path, monkeypatch, script, answer):
    squeue = tmp_path / "squeue"
    squeue.write_text(f'#!/bin/sh\n[ "$2" = --jobs=81 ] || exit 9\n{script}\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert job_state("81") is answer


def test_where_there_is_no_slurm_it_cannot_be_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert job_state("81") is JobState.UNKNOWN


def test_the_parts_of_proc_that_are_read():
    assert started_at(os.getpid()) > 0
    assert Holder.this_process("x").machine.startswith(
        Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    )
