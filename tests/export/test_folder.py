import errno
import os
import shutil
from collections import namedtuple

import pytest

from tide_mega.errors import ConfigError, ExportError
from tide_mega.export.folder import NOTE_FILE, PARTIAL, REPLACED, new_folder, require_room
from tide_mega.jobs.lock import FolderTakenError


def make(out, content="weights", overwrite=False):
    with new_folder(out, overwrite=overwrite) as folder:
        assert folder != out and {path.name for path in folder.iterdir()} == {NOTE_FILE, "in_use.json"}
        (folder / "model.safetensors").write_text(content)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_has_its_name_once_it_is_whole(tmp_path):
    make(tmp_path / "hf")
    assert names(tmp_path) == ["hf"]
    assert names(tmp_path / "hf") == [NOTE_FILE, "model.safetensors"]


def test_an_empty_folder_may_be_there(tmp_path):
    (tmp_path / "hf").mkdir()
    make(tmp_path / "hf")
    assert "model.safetensors" in names(tmp_path / "hf")


def test_an_export_is_replaced_where_that_is_wished_alone(tmp_path):
    make(tmp_path / "hf", "old")
    with pytest.raises(
        ConfigError, match=r"holds an export already: name a new folder, or give overwrite=true\."
    ):
        make(tmp_path / "hf")
    make(tmp_path / "hf", "new", overwrite=True)
    assert (tmp_path / "hf" / "model.safetensors").read_text() == "new"
    assert names(tmp_path) == ["hf"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_others_made_stays(tmp_path, overwrite):
    make(tmp_path / "hf")
    (tmp_path / "hf" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds what is no export's \(notes\.txt\)"):
        make(tmp_path / "hf", overwrite=overwrite)
    assert "notes.txt" in names(tmp_path / "hf")
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ConfigError, match="holds what is no export's"):
        make(file, overwrite=overwrite)
    (tmp_path / f"x{PARTIAL}").mkdir()
    (tmp_path / f"x{PARTIAL}" / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match="holds what is no export's: that is never removed"):
        make(tmp_path / "x", overwrite=overwrite)


def test_a_llama_folder_from_elsewhere_is_no_export(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds what is no export's"):
        make(tmp_path / "hf", overwrite=True)


def test_an_error_leaves_nothing_and_keeps_what_was_there(tmp_path):
    make(tmp_path / "hf", "old")
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "hf", overwrite=True) as folder:
        (folder / "model.safetensors").write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["hf"]
    assert (tmp_path / "hf" / "model.safetensors").read_text() == "old"


def test_what_a_killed_export_left_is_cleared_away(tmp_path):
    partial = tmp_path / f"hf{PARTIAL}"
    partial.mkdir()
    for name in ("model-00001-of-00009.safetensors", ".memory.tide.tmp-17", NOTE_FILE):
        (partial / name).write_text("half")
    make(tmp_path / "hf")
    assert names(tmp_path) == ["hf"]
    assert names(tmp_path / "hf") == [NOTE_FILE, "model.safetensors"]


def test_a_kill_between_two_renames_loses_nothing(tmp_path):
    make(tmp_path / "hf", "old")
    (tmp_path / "hf").rename(tmp_path / f"hf{REPLACED}")
    with pytest.raises(ConfigError, match="holds an export already"):
        make(tmp_path / "hf")
    assert (tmp_path / "hf" / "model.safetensors").read_text() == "old"
    shutil.copytree(tmp_path / "hf", tmp_path / f"hf{REPLACED}")
    make(tmp_path / "hf", "new", overwrite=True)
    assert names(tmp_path) == ["hf"]


def test_one_export_at_a_time(tmp_path):
    with (
        new_folder(tmp_path / "hf", overwrite=False) as folder,
        pytest.raises(FolderTakenError),
        new_folder(tmp_path / "hf", overwrite=False),
    ):
        pass
    assert names(tmp_path / "hf") == [NOTE_FILE] and not folder.exists()


def test_a_full_disk_is_a_sentence(tmp_path):
    with (
        pytest.raises(
            ExportError, match=r"could not be written \(No space left on device\): nothing of it is left"
        ),
        new_folder(tmp_path / "hf", overwrite=False),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert names(tmp_path) == []


def test_room_is_asked_for_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 10**9))
    require_room(tmp_path, 10**9)
    with pytest.raises(ExportError, match=r"takes 2\.00 GB, and the disk of .* has 1\.00 GB left: make room"):
        require_room(tmp_path, 2 * 10**9)
