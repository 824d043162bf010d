"""Files on disk: any number of boxes, gaps and overlaps refused, no pickle."""

import hashlib
import json
import os
import re
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import tide_mega
from tests.support.checkpoints import write_step
from tide_mega.checkpoint.contents import Stored, read, write
from tide_mega.checkpoint.folder import verify
from tide_mega.checkpoint.state import SavedState
from tide_mega.checkpoint.storage import BoxWriter
from tide_mega.checkpoint.weights import shapes, whole_tensor
from tide_mega.errors import CheckpointError
from tide_mega.model.canonical import Box


def save_boxes(folder, boxes):
    folder.mkdir()
    write(boxes, BoxWriter(folder, "id", prepare=lambda: None, commit=lambda files: None), None)


def box(offset, size, values=None, shape=(6, 8), name="t"):
    return Stored(Box(name, shape, offset, size), torch.empty(size) if values is None else values)


def test_any_cut_of_what_was_saved_in_other_boxes_can_be_read(tmp_path):
    whole = torch.randn(6, 8)
    cuts = [((0, 0), (1, 3)), ((0, 3), (1, 5)), ((1, 0), (4, 4)), ((1, 4), (4, 4)), ((5, 0), (1, 8))]
    boxes = [
        box(at, size, whole[at[0] : at[0] + size[0], at[1] : at[1] + size[1]].contiguous())
        for at, size in cuts
    ]
    save_boxes(tmp_path / "c", boxes)
    for first in range(6):
        for column in range(8):
            size = (6 - first, 8 - column)
            wanted = box((first, column), size)
            read([wanted], tmp_path / "c", None)
            assert torch.equal(wanted.values, whole[first:, column:])


def test_what_is_missing_is_an_error_and_not_old_memory(tmp_path):
    save_boxes(
        tmp_path / "c", [box((0, 0), (3, 8), torch.zeros(3, 8)), box((4, 0), (2, 8), torch.zeros(2, 8))]
    )
    read([box((0, 0), (3, 8))], tmp_path / "c", None)
    with pytest.raises(CheckpointError, match=r"t has gaps within \(6, 8\)"):
        read([box((0, 0), (6, 8))], tmp_path / "c", None)
    with pytest.raises(CheckpointError, match=r"should be there with shape \(6, 9\); there is \(6, 8\)"):
        read([box((0, 0), (1, 9), shape=(6, 9))], tmp_path / "c", None)


def test_boxes_that_overlap_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="overlap"):
        save_boxes(
            tmp_path / "c", [box((0, 0), (4, 8), torch.zeros(4, 8)), box((3, 0), (3, 8), torch.zeros(3, 8))]
        )


def test_files_are_plain_safetensors_and_json(tmp_path):
    write_step(tmp_path, 5)
    folder = tmp_path / "step-00000005"
    assert sorted(path.suffix for path in folder.iterdir()) == [".json"] * 3 + [".safetensors"]
    with safe_open(folder / "rank-00000.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == ["master/table@0,0", "master/table@1,0"]
        assert file.metadata() == {"save_id": "some5"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {"rank-00000.safetensors", "tensors.json", "state.json"}


def limited(folder):
    """Save where the operating system lets files grow to 300 bytes; return what was said."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limit[1]))
    try:
        write_step(folder, 2)
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    return None


def test_a_write_that_the_system_refuses_is_an_error_and_leaves_nothing(pools, tmp_path):
    write_step(tmp_path, 1)
    (said,) = pools(1).run(limited, tmp_path)
    assert said is not None and "File too large" in said
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_no_pickle_is_ever_loaded():
    sources = Path(tide_mega.__file__).parent.rglob("*.py")
    forbidden = (
        "torch.load",
        "torch.save",
        "import pickle",
        "pickle.load",
        "allow_pickle=True",
        "from pickle",
    )
    found = [(path.name, word) for path in sources for word in forbidden if word in path.read_text()]
    assert found == []


FILES = ["manifest.json", "state.json", "tensors.json", "rank-00000.safetensors"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", ["elsewhere", "beside it"])
def test_a_link_in_a_checkpoint_is_not_followed(tmp_path, name, where):
    write_step(tmp_path / "c", 5)
    folder = tmp_path / "c" / "step-00000005"
    target = folder / "away" if where == "beside it" else tmp_path / "away"
    (folder / name).rename(target)
    (folder / name).symlink_to(target)
    (said,) = verify(folder)
    assert f"{name} is a link" in said or f"{name} cannot be read ({name} is a link)" in said
    if name in FILES[2:]:
        with pytest.raises(CheckpointError, match=f"{name} is a link"):
            whole_tensor(folder, "master/table", (2, 64))
    if name == "tensors.json":
        with pytest.raises(CheckpointError, match=f"{name} is a link"):
            shapes(folder)
    if name == "state.json":
        with pytest.raises(CheckpointError, match=f"{name} is a link"):
            SavedState.read(folder)


def test_a_folder_or_pipe_in_the_place_of_a_file_is_found(tmp_path):
    write_step(tmp_path, 5)
    folder = tmp_path / "step-00000005"
    for name, make in (("tensors.json", os.mkfifo), ("rank-00000.safetensors", os.mkdir)):
        (folder / name).unlink()
        make(folder / name)
    assert verify(folder) == [f"{name} is not a regular file" for name in (FILES[3], FILES[2])]


NAMES_ELSEWHERE = ["../away", "/etc/passwd", "..", ".", "", "a/b", "a\0b", 7]


@pytest.mark.parametrize("name", NAMES_ELSEWHERE[:-1])
def test_a_manifest_that_names_what_lies_elsewhere_is_refused(tmp_path, name):
    write_step(tmp_path, 5)
    folder = tmp_path / "step-00000005"
    (tmp_path / "away").write_bytes(b"")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (said,) = verify(folder)
    assert said == f"manifest.json cannot be read ({name!r} is not the plain name of a file)"


@pytest.mark.parametrize("name", NAMES_ELSEWHERE)
def test_tensors_that_are_said_to_lie_elsewhere_are_not_read(tmp_path, name):
    write_step(tmp_path, 5)
    folder = tmp_path / "step-00000005"
    shutil.copyfile(folder / "rank-00000.safetensors", tmp_path / "away")
    index = json.loads((folder / "tensors.json").read_text())
    for place in index["tensors"]["master/table"]["boxes"]:
        place[2] = name
    (folder / "tensors.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=re.escape(f"{name!r} is not the plain name of a file")):
        whole_tensor(folder, "master/table", (2, 64))
