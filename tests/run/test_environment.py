import json
import platform
import socket
import subprocess
from pathlib import Path

import pytest
import torch

from tide_mega.parallel.device import detect_libraries
from tide_mega.run.environment import describe_environment, git_state


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_names_versions_and_no_machine() -> None:
    environment = describe_environment(torch.device("cpu"), world_size=4)
    text = json.dumps(environment)
    # Without the build's mark, which the wheels for CUDA have in the module alone.
    assert environment["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert environment["python"] == platform.python_version()
    assert environment["optional"] == detect_libraries()
    assert (environment["device"], environment["world_size"]) == ("cpu", 4)
    assert socket.gethostname() not in text
    assert str(Path.cwd()) not in text


def test_git_state_follows_the_tracked_files(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("1")
    assert git_state(package) is None, "no checkout"
    git(tmp_path, "init", "-q")
    assert git_state(package) is None, "nothing of it is tracked"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert git_state(package) == {"commit": head, "dirty": False, "remote": None}
    (package / "untracked").write_text("2")
    assert git_state(package) == {"commit": head, "dirty": False, "remote": None}
    (package / "a.py").write_text("2")
    assert git_state(package) == {"commit": head, "dirty": True, "remote": None}


def test_without_git_there_is_no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(Path(__file__).parent) is None


def test_the_remote_is_noted_without_its_token(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    git(tmp_path, "remote", "add", "origin", "https://MARKER@example.org/a.git")
    state = git_state(tmp_path)
    assert state is not None and state["remote"] == "https://example.org/a.git"
