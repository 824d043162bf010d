"""torch.compile: the one door. Chains of elementwise operations become single passes over memory on a GPU."""

import functools
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_CACHE = "TORCHINDUCTOR_CACHE_DIR"


def compiled(function: Callable[..., Any], device: torch.device, enabled: bool) -> Callable[..., Any]:
    """Return `function` compiled where that pays: on CUDA, and `enabled` (config key `kernels.compile`).

    The same function is compiled once in a process, however often it is asked for. A first size is compiled as
    it is, a second one makes the size dynamic.
    """
    return _compile(function) if enabled and device.type == "cuda" else function


def compiled_step(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Return a step of a decoder compiled, each size by itself; on CUDA it is replayed as a graph of kernels."""
    _choose_cache()
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    return torch.compile(function, dynamic=False, mode=mode)


@functools.cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    _choose_cache()
    return torch.compile(function, dynamic=None)


def _choose_cache() -> None:
    if not os.environ.get(_CACHE):
        os.environ[_CACHE] = str(private_cache_folder() / "inductor")


def private_cache_folder() -> Path:
    """Return a folder for compiled code that nobody else could have filled: this user's, with mode 0700.

    It is the one that slurm/task.sh chooses, or a new one where that is another's, a link, or was open to others.
    What lies there is run, and torch would use a folder for temporary files whoever made it.
    """
    place = Path(tempfile.gettempdir())
    folder = place / f"tide-mega-{os.getuid()}"
    if _may_rename_only_own(place):
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            found = folder.lstat()
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
                folder.chmod(0o700)
                return folder
        except OSError:  # a file or a dangling link, or one that may not be made
            pass
    return Path(tempfile.mkdtemp(prefix="tide-mega-"))


def _may_rename_only_own(place: Path) -> bool:
    mode = place.stat().st_mode
    return bool(mode & stat.S_ISVTX) or not mode & 0o022
