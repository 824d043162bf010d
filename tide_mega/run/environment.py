"""What a run ran on: versions, git state, device, optional libraries; contains no host name and no path."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import tide_mega
from tide_mega.config.versions import package_versions
from tide_mega.errors import without_credentials
from tide_mega.parallel.device import detect_libraries


def describe_environment(device: torch.device, world_size: int) -> dict[str, Any]:
    """Return the content of environment.json as JSON values; None where something is not known."""
    return {
        "tide_mega": tide_mega.__version__,
        "python": platform.python_version(),
        "platform": platform.system() + "-" + platform.machine(),
        "packages": package_versions(),
        "optional": detect_libraries(),
        "git": git_state(Path(tide_mega.__file__).parent),
        "cuda": torch.version.cuda,
        "device": device_name(device),
        "world_size": world_size,
    }


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return commit, whether tracked files differ from it, and the URL of `origin` without credentials.

    None outside a checkout that tracks `folder`.
    """
    if _git(folder, "ls-files", "--error-unmatch", ".") is None:
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    status = _git(folder, "status", "--porcelain", "--untracked-files=no")
    if commit is None or status is None:
        return None
    remote = _git(folder, "remote", "get-url", "origin")
    return {"commit": commit, "dirty": bool(status), "remote": remote and without_credentials(remote)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
