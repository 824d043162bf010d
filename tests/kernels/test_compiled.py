"""When a function is compiled, and when it is left alone."""

import os
import tempfile
from pathlib import Path

import pytest
import torch

from tide_mega.kernels.compiled import compiled, private_cache_folder


def double(x):
    return 2 * x


@pytest.mark.parametrize(("device", "enabled"), [("cpu", True), ("cpu", False), ("cuda", False)])
def test_a_function_is_left_alone_off_the_gpu_or_when_switched_off(device, enabled):
    assert compiled(double, torch.device(device), enabled) is double


def test_on_a_gpu_it_is_compiled_once():
    cuda = torch.device("cuda")
    assert compiled(double, cuda, True) is not double
    assert compiled(double, cuda, True) is compiled(double, cuda, True)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A place for temporary files, and the folder there that this user's processes share."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path, tmp_path / f"tide-mega-{os.getuid()}"


def test_compiled_code_is_kept_in_a_private_folder(place):
    _, folder = place
    assert private_cache_folder() == folder == private_cache_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    assert private_cache_folder() == folder
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_made_or_could_fill_holds_no_compiled_code(place):
    root, folder = place

    def assert_new():
        found = private_cache_folder()
        assert found != folder and found.parent == root
        assert found.stat().st_mode & 0o777 == 0o700

    folder.touch()
    assert_new()
    folder.unlink()
    (root / "elsewhere").mkdir()
    folder.symlink_to(root / "elsewhere")
    assert_new()
    folder.unlink()
    folder.mkdir()
    folder.chmod(0o770)
    assert_new()
    folder.chmod(0o700)
    root.chmod(0o777)
    assert_new()
    root.chmod(0o1777)
    assert private_cache_folder() == folder


def test_a_folder_of_another_user_holds_no_compiled_code(place, monkeypatch):
    _, folder = place
    folder.mkdir(mode=0o700)
    true = Path.lstat

    def lstat(path):
        found = list(true(path))
        found[4] += path == folder  # the owner
        return os.stat_result(found)

    monkeypatch.setattr(Path, "lstat", lstat)
    assert private_cache_folder() != folder


@pytest.mark.parametrize("given", [None, "", "/mine"])
def test_the_cache_is_named_before_anything_is_compiled_unless_it_is_given(place, monkeypatch, given):
    _, folder = place
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    if given is None:
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    else:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", given)
    monkeypatch.setattr(torch, "compile", lambda function, **_: os.environ["TORCHINDUCTOR_CACHE_DIR"])
    seen = compiled(lambda x: x, torch.device("cuda"), enabled=True)
    assert seen == (given or str(folder / "inductor"))
