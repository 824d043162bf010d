"""Saving beside training: what fails, what is kept, what is copied."""

import errno
import logging
import os
import shutil
import threading
from dataclasses import replace

import pytest
import torch.distributed as dist

from tests.support.checkpoints import write_step
from tests.support.runs import tiny, train_here
from tide_mega.checkpoint import saver as job
from tide_mega.checkpoint import storage
from tide_mega.checkpoint.folder import CheckpointFolder, newest_valid, step_of, verify
from tide_mega.checkpoint.saver import Keep
from tide_mega.checkpoint.state import SavedState
from tide_mega.errors import CheckpointError
from tide_mega.parallel.groups import World
from tide_mega.training.trainer import Trainer


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_milestones_stay_whatever_their_number(tmp_path):
    write_step(tmp_path, 2)
    state = tmp_path / "step-00000002" / "state.json"
    saved = SavedState.read(state.parent)
    state.write_text(replace(saved, progress=replace(saved.progress, is_milestone=True)).dump())
    for step in (3, 4, 5):
        write_step(tmp_path, step, keep=Keep(last=1, every=4))
    assert [step_of(path) for path in CheckpointFolder(tmp_path).complete()] == [2, 4, 5]


def test_the_newest_and_the_multiples_are_kept(tmp_path):
    for step in range(1, 10):
        write_step(tmp_path, step, keep=Keep(last=2, every=4))
    assert names(tmp_path) == [f"step-0000000{step}" for step in (4, 8, 9)]


def test_what_was_just_saved_stays_even_below_newer_ones(tmp_path):
    for step in (5, 6):
        write_step(tmp_path, step)
    write_step(tmp_path, 3, keep=Keep(last=1))
    assert names(tmp_path) == ["step-00000003", "step-00000006"]


def test_the_same_step_is_replaced(tmp_path):
    write_step(tmp_path, 3, save_id="first")
    write_step(tmp_path, 3, save_id="second")
    assert names(tmp_path) == ["step-00000003"]
    assert '"save_id": "second3"' in (tmp_path / "step-00000003/state.json").read_text()
    assert verify(tmp_path / "step-00000003") == []


@pytest.mark.parametrize("instant", ["before the new name", "after it"])
def test_killed_while_replacing_one_of_the_two_is_found(tmp_path, instant):
    write_step(tmp_path, 3, save_id="first")
    replaced = tmp_path / "step-00000003.replaced"
    (tmp_path / "step-00000003").rename(replaced)
    if instant == "after it":
        write_step(tmp_path / "new", 3, save_id="second")
        (tmp_path / "new" / "step-00000003").rename(tmp_path / "step-00000003")
        shutil.rmtree(tmp_path / "new")
    search = newest_valid([CheckpointFolder(tmp_path)])
    assert search.found == (tmp_path / "step-00000003" if instant == "after it" else replaced)
    write_step(tmp_path, 4)
    expected = "step-00000003" if instant == "after it" else replaced.name
    assert names(tmp_path) == [expected, "step-00000004"]


def test_what_a_kill_left_is_removed_by_the_next_save(tmp_path):
    for left in ("step-00000007.partial", "step-00000001.partial"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "rank-00000.safetensors").write_bytes(b"x")
    others = ["step-notes.partial", "step-00000007.old.partial"]
    for other in others:
        (tmp_path / other).mkdir()
    write_step(tmp_path, 8)
    assert names(tmp_path) == sorted([*others, "step-00000008"])


def test_a_leftover_that_cannot_be_removed_does_not_stop_a_save(tmp_path, monkeypatch, caplog):
    left = tmp_path / "step-00000007.partial"
    left.mkdir()

    def refuse(path):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)  # as of a folder that holds an .nfs file
    write_step(tmp_path, 7)
    write_step(tmp_path, 8, keep=Keep(last=1))
    assert verify(tmp_path / "step-00000008") == []
    assert names(tmp_path) == ["step-00000007.partial", "step-00000008"]
    assert "could not be removed" in caplog.text


@pytest.fixture
def linked(tmp_path):
    """A folder of checkpoints that is a link to a scratch disk."""
    (tmp_path / "scratch" / "mine").mkdir(parents=True)
    (tmp_path / "checkpoints").symlink_to(tmp_path / "scratch" / "mine")
    return tmp_path / "checkpoints"


def test_a_linked_folder_stays_a_link_when_it_is_set_aside(linked):
    write_step(linked, 3)
    aside = CheckpointFolder(linked).set_aside()
    write_step(linked, 1)
    assert linked.is_symlink() and names(linked) == ["step-00000001"]
    assert aside == linked.parent / "scratch" / "mine.replaced-1"
    assert names(aside) == ["step-00000003"]


def test_a_link_to_a_folder_that_was_purged_is_written_through(linked):
    (linked.parent / "scratch" / "mine").rmdir()
    write_step(linked, 3)
    assert linked.is_symlink() and verify(linked / "step-00000003") == []


@pytest.fixture
def elsewhere(tmp_path):
    """A folder of checkpoints that somebody links to."""
    write_step(tmp_path / "elsewhere", 1)
    return tmp_path / "elsewhere" / "step-00000001"


def targets(elsewhere):
    """What a link in a folder of checkpoints may point to: a checkpoint, nothing, and where nobody may look."""
    return [elsewhere, elsewhere.with_name("gone"), "x" * 300]


@pytest.mark.parametrize("target", range(3))
@pytest.mark.parametrize(
    "name", ["step-00000001", "step-00000003", "step-00000003.partial", "step-00000003.replaced"]
)
@pytest.mark.parametrize("place", ["local", "remote"])
def test_a_link_is_unlinked_and_what_it_points_to_stays(tmp_path, elsewhere, caplog, place, name, target):
    write_step(tmp_path / "local", 2, remote=CheckpointFolder(tmp_path / "remote"))
    link = tmp_path / place / name
    link.symlink_to(targets(elsewhere)[target])
    before = {path: path.stat().st_mtime_ns for path in elsewhere.parent.rglob("*")}
    keeps = {"keep": Keep(1, every=5), "remote_keep": Keep(1)}
    for step in (3, 4):
        write_step(tmp_path / "local", step, remote=CheckpointFolder(tmp_path / "remote"), **keeps)
    for folder in ("local", "remote"):
        # A broken link is no checkpoint: where nothing is saved under its name it is in nobody's way.
        broken = {name} if folder == place and name == "step-00000001" and target else set()
        assert set(names(tmp_path / folder)) == {"step-00000004", *broken}
    assert not os.path.lexists(link) or name == "step-00000001"
    assert {path: path.stat().st_mtime_ns for path in elsewhere.parent.rglob("*")} == before
    assert verify(elsewhere) == [] and "could not" not in caplog.text


def test_a_whole_checkpoint_goes_out_of_sight_under_no_link(tmp_path, elsewhere):
    write_step(tmp_path / "local", 2)
    folder = CheckpointFolder(tmp_path / "local")
    write_step(tmp_path / "local", 3)
    (tmp_path / "local" / "step-00000002.partial").symlink_to(elsewhere)
    folder.retain(1, None, 3)
    assert names(folder.path) == ["step-00000003"] and verify(elsewhere) == []


def test_a_checkpoint_that_is_being_read_stays_until_the_next_save_after(tmp_path):
    write_step(tmp_path, 2, keep=Keep(1))
    write_step(tmp_path, 3, keep=Keep(1), in_use=lambda: {2})
    write_step(tmp_path, 4, keep=Keep(1), in_use=lambda: {2})
    assert names(tmp_path) == ["step-00000002", "step-00000004"]
    write_step(tmp_path, 5, keep=Keep(1))
    assert names(tmp_path) == ["step-00000005"]


def test_a_failed_save_leaves_what_a_link_points_to(tmp_path, elsewhere):
    folder = CheckpointFolder(tmp_path / "local")
    folder.path.mkdir()
    folder.partial(2).symlink_to(elsewhere)
    folder.discard(2)
    assert names(folder.path) == [] and verify(elsewhere) == []


def test_nothing_is_renamed_over_a_link(tmp_path):
    write_step(tmp_path / "local", 2)
    folder = CheckpointFolder(tmp_path / "local")
    (tmp_path / "local" / "step-00000002.damaged-1").symlink_to("gone")
    (tmp_path / "local.replaced-1").symlink_to("gone")
    assert folder.mark_damaged(folder.final(2)).name == "step-00000002.damaged-2"
    write_step(tmp_path / "local", 3)
    assert folder.set_aside() == tmp_path / "local.replaced-2"
    assert (tmp_path / "local.replaced-1").is_symlink()


def test_what_is_no_checkpoint_stays_when_they_are_set_aside(tmp_path):
    write_step(tmp_path, 2)
    (tmp_path / "in_use.json").write_text("a lock")
    (tmp_path / "step-00000003.partial").mkdir()
    aside = CheckpointFolder(tmp_path).set_aside()
    assert names(tmp_path) == ["in_use.json"]
    assert names(aside) == ["step-00000002", "step-00000003.partial"]


def test_finished_checkpoints_are_copied_and_kept_by_their_own_rule(tmp_path):
    local, remote = tmp_path / "local", CheckpointFolder(tmp_path / "remote")
    for step in range(1, 5):
        write_step(local, step, keep=Keep(1), remote=remote, remote_keep=Keep(3))
    assert names(local) == ["step-00000004"]
    assert names(remote.path) == [f"step-0000000{step}" for step in (2, 3, 4)]
    for path in remote.complete():
        assert verify(path) == []


def test_the_newest_valid_of_both_places_is_taken(tmp_path):
    local, remote = CheckpointFolder(tmp_path / "local"), CheckpointFolder(tmp_path / "remote")
    for step in (1, 2):
        write_step(local.path, step, remote=remote)
    assert newest_valid([local, remote]).found == local.final(2)
    (local.final(2) / "tensors.json").write_text("{}")
    assert newest_valid([local, remote]).found == remote.final(2)
    shutil.rmtree(local.path)
    assert newest_valid([local, remote]).found == remote.final(2)
    (remote.final(2) / "tensors.json").write_text("{}")
    assert newest_valid([local, remote]).found == remote.final(1)


def test_a_copy_that_went_wrong_is_removed_and_the_local_one_stays(tmp_path, monkeypatch):
    def torn(source, target):
        target.write_bytes(source.read_bytes()[:-1])

    monkeypatch.setattr(job.shutil, "copyfile", torn)
    remote = CheckpointFolder(tmp_path / "remote")
    with pytest.raises(CheckpointError, match=r"step 1 is whole in .*could not be copied to .*is not what"):
        write_step(tmp_path / "local", 1, remote=remote)
    assert names(remote.path) == []
    assert verify(tmp_path / "local" / "step-00000001") == []


def full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("place", ["save_file", "to_disk", "json.dumps"])
def test_a_save_that_fails_leaves_nothing_that_looks_whole(tmp_path, monkeypatch, place):
    write_step(tmp_path, 1)
    monkeypatch.setattr(f"tide_mega.checkpoint.storage.{place}", full_disk)
    with pytest.raises(
        CheckpointError, match=r"step 2 could not be written \(rank 0: OSError.*No space left"
    ):
        write_step(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"]
    assert verify(tmp_path / "step-00000001") == []


def train_with_full_disk(config, failing_steps, on_rank):
    """Train in a pool's worker while saves fail on one rank; return what happened."""
    said = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("tide_mega.checkpoint")
    logger.addHandler(handler)
    sound = storage.save_file

    def save_file(boxes, path, metadata):
        step = int(path.parent.name.split("-")[1].split(".")[0])
        if step in failing_steps and dist.get_rank() == on_rank:
            path.write_bytes(b"half")
            full_disk()
        sound(boxes, path, metadata)

    storage.save_file = save_file
    trainer = Trainer(config, World.from_environment())
    try:
        trainer.run()
    except CheckpointError as error:
        return trainer.state.step, str(error), said
    finally:
        storage.save_file = sound
        logger.removeHandler(handler)
        trainer.close()
    return trainer.state.step, None, said


@pytest.mark.parametrize("asynchronous", ["true", "false"])
@pytest.mark.parametrize("on_rank", [0, 1])
def test_a_failure_in_the_thread_stops_every_rank_at_the_same_step(
    pools, tiny_data, tmp_path, asynchronous, on_rank
):
    config = tiny(
        tiny_data,
        tmp_path,
        *("checkpoint.every=2", f"checkpoint.asynchronous={asynchronous}", "trainer.eval_every=0"),
        world_size=2,
    )
    first, second = pools(2).run(train_with_full_disk, config, [4], on_rank)
    assert first[:2] == second[:2]
    step, error, _ = first
    assert 4 <= step <= 6
    assert f"the checkpoint of step 4 could not be written (rank {on_rank}: OSError" in error
    assert "checkpoint.on_error=continue" in error
    assert names(tmp_path / "tiny" / "checkpoints") == ["step-00000002"]
    assert pools(2).run(train_here, config) == [6, 6]


def test_on_error_continue_trains_on_with_the_older_one(pools, tiny_data, tmp_path):
    config = tiny(
        tiny_data, tmp_path, "checkpoint.every=2", "checkpoint.on_error=continue", "trainer.eval_every=0"
    )
    ((step, error, said),) = pools(1).run(train_with_full_disk, config, [4], 0)
    assert (step, error) == (6, None)
    assert len(said) == 1 and "step 4 could not be written" in said[0] and "training goes on" in said[0]
    assert names(tmp_path / "tiny" / "checkpoints") == ["step-00000002", "step-00000006"]


def train_beside_a_slow_save(config):
    """Train in a pool's worker; the first save writes only after a later step has been made."""
    sound, later, order = storage.save_file, threading.Event(), []

    def save_file(boxes, path, metadata):
        assert later.wait(60)
        order.append(path.parent.name)
        sound(boxes, path, metadata)

    storage.save_file = save_file
    trainer = Trainer(config, World.from_environment())
    poll = trainer.checkpoints.poll

    def counted():
        if trainer.state.step == 5:
            later.set()
        poll()

    trainer.checkpoints.poll = counted
    try:
        trainer.run()
    finally:
        storage.save_file = sound
        trainer.close()
    return order


def test_training_goes_on_while_a_thread_writes_what_was(pools, tiny_data, tmp_path):
    overrides = ("checkpoint.every=3", "checkpoint.at_end=true", "trainer.eval_every=0")
    pools(1).run(train_here, tiny(tiny_data, tmp_path / "plain", *overrides, "checkpoint.asynchronous=false"))
    config = tiny(tiny_data, tmp_path / "slow", *overrides)
    (order,) = pools(1).run(train_beside_a_slow_save, config)
    assert order == ["step-00000003.partial", "step-00000006.partial"]
    # Steps 4 and 5 went by before step 3 was written; what was written is step 3's all the same.
    for step in (3, 6):
        plain, slow = (
            tmp_path / name / "tiny" / "checkpoints" / f"step-0000000{step}" / "rank-00000.safetensors"
            for name in ("plain", "slow")
        )
        assert plain.read_bytes()[-100_000:] == slow.read_bytes()[-100_000:]


def train_with_failing_snapshot(config):
    """Train in a pool's worker; rank 1 runs out of memory when it copies its part of step 4."""
    trainer = Trainer(config, World.from_environment())
    contents = trainer.checkpoints.contents
    sound = contents.snapshot

    def snapshot():
        if trainer.state.step == 4 and dist.get_rank() == 1:
            raise MemoryError("no room for the copy")
        return sound()

    contents.snapshot = snapshot
    try:
        trainer.run()
    except CheckpointError as error:
        return trainer.state.step, str(error)
    finally:
        trainer.close()
    return None


def test_a_rank_that_cannot_copy_its_part_stops_all_and_none_hangs(pools, tiny_data, tmp_path):
    overrides = ("checkpoint.every=2", "memory.owners=tensor_data", "trainer.eval_every=0")
    config = tiny(tiny_data, tmp_path, *overrides, world_size=2)
    first, second = pools(2).run(train_with_failing_snapshot, config)
    assert first == second
    assert "rank 1: MemoryError: no room for the copy" in first[1]
    assert names(tmp_path / "tiny" / "checkpoints") == ["step-00000002"]
