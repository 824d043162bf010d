"""Every kind of damage is found, and the next older checkpoint taken."""

import json
import os
import random
import shutil

import pytest
import torch

from tests.support.checkpoints import write_steps
from tide_mega.checkpoint.folder import CheckpointFolder, newest_valid, verify
from tide_mega.checkpoint.storage import Manifest
from tide_mega.checkpoint.weights import whole_tensor
from tide_mega.errors import CheckpointError

FILES = ["rank-00000.safetensors", "rank-00001.safetensors", "tensors.json", "state.json", "manifest.json"]
SEED = random.randrange(10**6)


@pytest.fixture(scope="module")
def written(pools, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "checkpoints"
    pools(2).run(write_steps, folder, [1, 2])
    return folder


@pytest.fixture
def checkpoints(written, tmp_path):
    shutil.copytree(written, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def flip_a_bit(path, chance):
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def truncate(path, chance):
    os.truncate(path, chance.randrange(path.stat().st_size))


def delete(path, chance):
    path.unlink()


def append(path, chance):
    with path.open("ab") as file:
        file.write(b"\0")


def empty(path, chance):
    path.write_bytes(b"")


def assert_falls_back(checkpoints, caplog, *said):
    search = newest_valid([CheckpointFolder(checkpoints)])
    assert search.found == checkpoints / "step-00000001", f"seed {SEED}"
    (problems,) = search.skipped.values()
    for text in said:
        assert text in "; ".join(problems)
    assert f"skipped {checkpoints / 'step-00000002'}" in caplog.text


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("harm", [flip_a_bit, truncate, delete, append, empty])
def test_a_harmed_file_is_found(checkpoints, caplog, harm, file):
    harm(checkpoints / "step-00000002" / file, random.Random(SEED))
    # A manifest may be harmed so that it can be read, and says something else of the others.
    assert_falls_back(checkpoints, caplog, "" if file == "manifest.json" else file)


def test_many_random_bits_are_all_found(checkpoints):
    chance, newest = random.Random(SEED), checkpoints / "step-00000002"
    for _ in range(150):
        path = newest / chance.choice(FILES)
        sound = path.read_bytes()
        flip_a_bit(path, chance)
        assert verify(newest), f"{path.name}, seed {SEED}"
        path.write_bytes(sound)
    assert verify(newest) == []


def test_a_manifest_that_names_one_file_twice_and_another_never_is_found(checkpoints, caplog):
    """One bit makes rank 0 of its files rank 1, whose true record follows."""
    manifest = checkpoints / "step-00000002" / "manifest.json"
    text = manifest.read_text()
    assert text.count('"rank-00000.safetensors"') == 1
    manifest.write_text(text.replace('"rank-00000.safetensors"', '"rank-00001.safetensors"'))
    assert_falls_back(checkpoints, caplog, "says 'rank-00001.safetensors' twice")


def test_swapped_ranks_are_found(checkpoints, caplog):
    first, second = (checkpoints / "step-00000002" / name for name in FILES[:2])
    third = first.with_name("third")
    first.rename(third), second.rename(first), third.rename(second)
    assert_falls_back(checkpoints, caplog, "rank-00000.safetensors does not have its checksum", "rank-00001")


@pytest.mark.parametrize("file", FILES)
def test_a_file_of_another_save_is_found(checkpoints, caplog, file):
    shutil.copyfile(checkpoints / "step-00000001" / file, checkpoints / "step-00000002" / file)
    assert_falls_back(checkpoints, caplog)


@pytest.mark.parametrize("file", FILES)
def test_a_file_of_another_save_of_the_same_step_is_found(pools, checkpoints, tmp_path, caplog, file):
    # Same values, another save: only its identity tells.
    pools(2).run(write_steps, tmp_path / "again", [2], "another")
    shutil.copyfile(tmp_path / "again" / "step-00000002" / file, checkpoints / "step-00000002" / file)
    assert_falls_back(checkpoints, caplog)


def test_a_manifest_of_another_save_id_alone_is_found(checkpoints, caplog):
    path = checkpoints / "step-00000002" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "save_id": "another"}))
    assert_falls_back(checkpoints, caplog, "another save")


def test_a_folder_renamed_to_another_step_is_found(checkpoints):
    (checkpoints / "step-00000001").rename(checkpoints / "step-00000003")
    search = newest_valid([CheckpointFolder(checkpoints)])
    assert search.found == checkpoints / "step-00000002"
    assert search.skipped[checkpoints / "step-00000003"] == ["its manifest is of step 1"]


@pytest.mark.parametrize(
    "name", [".nfs00000000deadbeef00000001", ".DS_Store", "rank-00002.safetensors", "notes/"]
)
def test_what_the_manifest_does_not_list_is_no_damage(checkpoints, caplog, name):
    newest = checkpoints / "step-00000002"
    if name.endswith("/"):
        (newest / name).mkdir()
    else:
        (newest / name).write_bytes(b"x")
    search = newest_valid([CheckpointFolder(checkpoints)])
    assert search.found == newest
    assert not search.skipped and not caplog.records
    assert Manifest.read(newest).foreign(newest) == [name.rstrip("/")]


def test_nothing_but_damage_is_an_error_and_no_new_start(checkpoints):
    for step in (1, 2):
        (checkpoints / f"step-0000000{step}" / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"every checkpoint of this run is damaged.*step-00000001"):
        newest_valid([CheckpointFolder(checkpoints)])


def test_an_empty_or_absent_folder_is_a_new_start(tmp_path):
    assert newest_valid([CheckpointFolder(tmp_path / "none")]).found is None


def in_parallel(folder):
    """Verify from all workers of a pool."""
    from torch.distributed import group

    search = newest_valid([CheckpointFolder(folder)], group.WORLD)
    return search.found, list(search.skipped.values())


@pytest.mark.parametrize("file", FILES[:2])
def test_ranks_share_the_reading_and_agree(pools, checkpoints, file):
    flip_a_bit(checkpoints / "step-00000002" / file, random.Random(SEED))
    first, second = pools(2).run(in_parallel, checkpoints)
    assert first == second == (checkpoints / "step-00000001", [[f"{file} does not have its checksum"]])


def test_what_two_ranks_wrote_one_reads(checkpoints):
    values = whole_tensor(checkpoints / "step-00000002", "master/table", (2, 64))
    assert torch.equal(values, torch.full((2, 64), 2.0))
    with pytest.raises(CheckpointError, match="should be there with shape"):
        whole_tensor(checkpoints / "step-00000002", "master/other", (2, 64))


def test_only_those_before_a_step_are_looked_at(checkpoints):
    folder = CheckpointFolder(checkpoints)
    assert newest_valid([folder], before=2).found == checkpoints / "step-00000001"
    assert newest_valid([folder], before=1).found is None
