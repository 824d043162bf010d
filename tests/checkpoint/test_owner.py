"""A run goes on with its own checkpoints alone, whatever its name is."""

import json
import shutil
import subprocess

import pytest

from tests.support.checkpoints import write_step
from tide_mega.checkpoint import folder as owner
from tide_mega.checkpoint.folder import (
    MARK_FILE,
    CheckpointFolder,
    Mark,
    check_owner,
    claim_places,
    other_places,
)
from tide_mega.errors import CheckpointError, ConfigError


def content(folder):
    """Every file, and when it was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture
def remote(tmp_path):
    return tmp_path / "remote" / "tiny"


@pytest.fixture
def one(tmp_path, remote):
    """The folder of a run with a checkpoint in it and in its remote folder."""
    folder = tmp_path / "a" / "tiny"
    folder.mkdir(parents=True)
    claim_places(folder, [remote])
    write_step(folder / "checkpoints", 3, remote=CheckpointFolder(remote))
    return folder


@pytest.fixture
def other(tmp_path):
    """The folder of a run of the same name, which has not begun."""
    folder = tmp_path / "b" / "tiny"
    folder.mkdir(parents=True)
    return folder


def unmark(*folders):
    """Make folders what they were before there were marks."""
    for folder in folders:
        (folder / MARK_FILE).unlink()


def test_every_run_has_an_id_of_its_own_and_keeps_it(one, other, remote, tmp_path):
    claim_places(other, [])
    first = Mark.read(one).id
    assert len(first) == 32 and first != Mark.read(other).id
    claim_places(one, [remote, tmp_path / "another"])
    assert {Mark.read(place).id for place in (one, remote, tmp_path / "another")} == {first}
    assert Mark.read(remote).folder == str(one)


@pytest.mark.parametrize("has_begun", [False, True])
def test_the_remote_folder_of_another_run_of_the_name_is_refused(one, other, remote, has_begun):
    if has_begun:
        claim_places(other, [])
    before = content(remote), content(other)
    with pytest.raises(
        ConfigError, match=rf"{remote} holds checkpoints of another run, .* in {one} \(id "
    ) as said:
        claim_places(other, [remote])
    assert (content(remote), content(other)) == before
    assert ("lost" in str(said.value)) is not has_begun


def test_a_folder_that_was_lost_is_begun_again_as_the_sentence_says(one, other, remote):
    shutil.rmtree(one)
    with pytest.raises(ConfigError) as said:
        claim_places(other, [remote])
    subprocess.run(str(said.value).split("go on from there: ")[1], shell=True, check=True)
    claim_places(other, [remote])
    assert Mark.read(other) == Mark.read(remote) and Mark.read(remote).folder == str(other)


@pytest.mark.parametrize("restarts", ["1", "0"])
@pytest.mark.parametrize("job", ["7", "8"])
@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_a_requeued_job_that_lost_its_folder_goes_on(
    one, other, remote, monkeypatch, restarts, job, is_elsewhere
):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    claim_places(one, [remote])
    run_id = Mark.read(one).id
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    shutil.rmtree(one)
    folder = other if is_elsewhere else one
    folder.mkdir(exist_ok=True)
    if (restarts, job, is_elsewhere) == ("1", "7", False):
        claim_places(folder, [remote])
        assert Mark.read(folder).id == run_id
    else:
        with pytest.raises(ConfigError, match="another run"):
            claim_places(folder, [remote])


def test_a_run_from_before_the_marks_is_known_by_a_checkpoint_in_both_places(one, remote):
    unmark(one, remote)
    write_step(one / "checkpoints", 4)
    claim_places(one, [remote])
    assert Mark.read(one) == Mark.read(remote)


def test_checkpoints_from_before_the_marks_that_nothing_shows_to_be_its_own_are_refused(one, other, remote):
    unmark(one, remote)
    write_step(other / "checkpoints", 3, save_id="another of the same step")
    before = content(remote)
    with pytest.raises(ConfigError, match="do not say of which run they are") as said:
        claim_places(other, [remote])
    assert content(remote) == before and Mark.read(other) is None
    shutil.rmtree(other / "checkpoints")
    subprocess.run(str(said.value).split("this run's: ")[1], shell=True, check=True)
    claim_places(other, [remote])
    assert Mark.read(other) == Mark.read(remote)


def test_damaged_manifests_show_nothing(one, other, remote):
    unmark(one, remote)
    shutil.copytree(one / "checkpoints", other / "checkpoints")
    for folder in (other / "checkpoints", remote):
        (folder / "step-00000003" / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match="do not say"):
        claim_places(other, [remote])


def test_a_run_from_before_that_finds_anothers_mark_is_refused(one, other, remote):
    write_step(other / "checkpoints", 3)  # in both, as where two runs had shared the folder
    with pytest.raises(ConfigError, match="another run"):
        claim_places(other, [remote])


def test_linked_checkpoints_are_marked_where_they_lie(one, other, tmp_path):
    scratch = tmp_path / "scratch"
    write_step(scratch, 1)
    (other / "checkpoints").symlink_to(scratch)
    assert other_places(other, None) == [other / "checkpoints"]
    claim_places(other, other_places(other, None))
    assert Mark.read(scratch) == Mark.read(other)
    shutil.rmtree(one / "checkpoints")
    (one / "checkpoints").symlink_to(scratch)
    with pytest.raises(ConfigError, match="another run"):
        claim_places(one, other_places(one, None))


def test_a_link_to_the_checkpoints_of_another_run_is_refused(one, other):
    (other / "checkpoints").symlink_to(one / "checkpoints")
    with pytest.raises(ConfigError, match="another run"):
        claim_places(other, other_places(other, None))
    assert Mark.read(other) is None


def test_the_run_folder_itself_is_no_other_place(one):
    assert other_places(one, one.parent / "." / "tiny") == []


@pytest.mark.parametrize("harm", ["{", "[]", '{"id": "", "folder": "x"}', "null", "link", "folder"])
def test_a_mark_that_cannot_be_read_is_refused(one, remote, harm):
    path = remote / MARK_FILE
    whole = path.read_text()
    path.unlink()
    if harm == "link":
        path.with_name("away").write_text(whole)
        path.symlink_to("away")
    elif harm == "folder":
        path.mkdir()
    else:
        path.write_text(harm)
    with pytest.raises(ConfigError, match=rf"{path} cannot be read \(.*bring it back, or remove it"):
        check_owner(one, [remote])


@pytest.mark.parametrize("is_own", [True, False])
def test_what_cannot_be_marked_is_said_and_only_the_run_folder_must_be(
    other, remote, monkeypatch, caplog, is_own
):
    def full(path, value):
        if is_own or path.parent == remote:
            raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(owner, "write_json", full)
    if is_own:
        with pytest.raises(ConfigError, match=rf"{other / MARK_FILE} cannot be written \(No space left"):
            claim_places(other, [remote])
    else:
        claim_places(other, [remote])
        assert f"{remote} cannot be marked as this run's (No space left on device)" in caplog.text


def test_a_copy_is_refused_where_the_folder_has_come_to_be_anothers(one, other, remote):
    shutil.rmtree(remote)
    claim_places(other, [remote])
    write_step(other / "checkpoints", 8, remote=CheckpointFolder(remote))
    before = content(remote)
    with pytest.raises(CheckpointError, match=r"step 4 is whole in .* could not be copied to .*another run"):
        write_step(one / "checkpoints", 4, remote=CheckpointFolder(remote))
    assert content(remote) == before


def test_a_remote_folder_that_was_removed_is_marked_again_by_the_next_copy(one, remote):
    shutil.rmtree(remote)
    write_step(one / "checkpoints", 4, remote=CheckpointFolder(remote))
    assert json.loads((remote / MARK_FILE).read_text())["id"] == Mark.read(one).id
