"""The only user of torch.compile: on a GPU, chains of elementwise operations become single passes over memory."""

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
    """Return `function` compiled if that pays: on CUDA, and if `enabled` (config key `kernels.compile`).

    A function is compiled once per process, however often it is requested. The first size is compiled
    statically; a second one makes the size dynamic.
    """
    return _compile(function) if enabled and device.type == "cuda" else function


def compiled_step(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Return a decoder step compiled for each size separately; on CUDA it is replayed as a CUDA graph."""
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
    """Return a folder for compiled code that no other user could have filled: owned by this user, mode 0700.

    It is the folder that slurm/task.sh chooses, or a new one if that is another user's, a link, or was
    accessible to others. Its content is executed, and torch by itself would use a folder for temporary files
    whoever created it.
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
        except OSError:  # a file, a dangling link, or not permitted
            pass
    return Path(tempfile.mkdtemp(prefix="tide-mega-"))


def _may_rename_only_own(place: Path) -> bool:
    mode = place.stat().st_mode
    return bool(mode & stat.S_ISVTX) or not mode & 0o022
