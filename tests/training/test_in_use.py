"""A second start in a run folder changes nothing there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.support.runs import TINY, tiny, train_here
from tide_mega.checkpoint.folder import MARK_FILE
from tide_mega.errors import ConfigError, Exit
from tide_mega.jobs.lock import LOCK_FILE, FolderLock, FolderTakenError
from tide_mega.parallel.groups import World
from tide_mega.run.folder import held
from tide_mega.training.faults import watchdog
from tide_mega.training.trainer import train


def content(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture
def first(pools, tiny_data, tmp_path):
    """The folder of a run that another process is at work in, in the middle of a save."""
    pools(1).run(train_here, tiny(tiny_data, tmp_path, "trainer.max_steps=3"))
    folder = tmp_path / "tiny"
    (folder / "checkpoints" / "step-00000006.partial").mkdir()
    with FolderLock(folder, "a training", key="run.name"):
        yield folder


@pytest.mark.parametrize("more", ["checkpoint.resume=true", "checkpoint.resume=false"])
def test_a_second_start_is_refused_before_it_touches_anything(first, tiny_data, more):
    before = content(first)
    with pytest.raises(FolderTakenError, match=f"tiny is in use by a training .process {os.getpid()} on "):
        train(tiny(tiny_data, first.parent, more))
    assert content(first) == before


@pytest.mark.slow
def test_the_command_ends_with_a_sentence_and_its_status(first, tiny_data):
    before = content(first)
    words = [*TINY, f"data.path={tiny_data}", f"run.root={first.parent}", "run.name=tiny"]
    done = subprocess.run(
        [sys.executable, "-m", "tide_mega.train", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == Exit.TAKEN
    assert done.stderr.startswith(f"{first} is in use by a training (process {os.getpid()} on ")
    assert done.stderr.count("\n") == 1
    assert content(first) == before


def refused(config):
    """Hold a run folder in a pool's worker; return why not, and whether this rank saw it held."""
    world = World.from_environment()
    folder = Path(config.run.root) / config.run.name
    try:
        with held(config, writes=world.rank == 0):
            is_held = (folder / LOCK_FILE).exists()
            dist.barrier()
            return None, is_held
    except FolderTakenError as error:
        return str(error), False


def test_every_rank_learns_that_the_folder_is_taken(pools, tiny_data, tmp_path):
    config = tiny(tiny_data, tmp_path, world_size=2)
    with FolderLock(tmp_path / "tiny", "a training", key="run.name"):
        (one, _), (other, _) = pools(2).run(refused, config)
        assert one == other and "is in use by a training" in one
    assert pools(2).run(refused, config) == [(None, True)] * 2
    assert list((tmp_path / "tiny").iterdir()) == [tmp_path / "tiny" / MARK_FILE]


def test_two_runs_do_not_share_a_remote_folder(pools, tiny_data, tmp_path):
    def config(root):
        return tiny(tiny_data, tmp_path / root, f"checkpoint.remote={tmp_path / 'remote'}")

    with FolderLock(tmp_path / "remote" / "tiny", "a training", key="checkpoint.remote"):
        ((said, _),) = pools(1).run(refused, config("a"))
        assert f"{tmp_path / 'remote' / 'tiny'} is in use" in said
        assert not (tmp_path / "a" / "tiny" / LOCK_FILE).exists()
    assert pools(1).run(refused, config("remote")) == [(None, True)], "the run folder itself is no other"
    (tmp_path / "remote" / "tiny").rename(tmp_path / "remote" / "away")
    (tmp_path / "remote" / "tiny").write_text("no folder")
    assert pools(1).run(refused, config("b")) == [(None, True)], "copies may fail, the training goes on"


def test_a_run_that_ended_leaves_no_lock(tiny_data, tmp_path):
    folder = train(
        tiny(tiny_data, tmp_path, "trainer.max_steps=3", "checkpoint.every=0", "trainer.eval_every=0")
    )
    assert folder.finish().step == 3
    assert not (folder.path / LOCK_FILE).exists()


def test_a_hung_process_that_is_ended_leaves_no_lock(tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(watchdog.os, "_exit", ended.append)
    FolderLock(tmp_path, "a training", key="run.name").__enter__()
    watchdog._end(Exit.HUNG)
    assert ended == [Exit.HUNG] and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_of_the_same_name_takes_nothing_of_anothers_remote_folder(tiny_data, tmp_path):
    def words(root, *more):
        remote = f"checkpoint.remote={tmp_path / 'remote'}"
        return tiny(tiny_data, tmp_path / root, remote, "trainer.eval_every=0", *more)

    train(words("a", "trainer.max_steps=3"))
    before = content(tmp_path / "remote")
    for more in ("checkpoint.resume=true", "checkpoint.resume=false"):
        with pytest.raises(
            ConfigError, match=rf"remote/tiny holds checkpoints of another run, .*{tmp_path}/a/tiny"
        ):
            train(words("b", more))
    assert content(tmp_path / "remote") == before
    assert list((tmp_path / "b" / "tiny").iterdir()) == []
    assert train(words("a")).finish().step == 6
