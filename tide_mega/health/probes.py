"""What takes all ranks together: an all-reduce, and files that all nodes must see."""

import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tide_mega.health.meeting import Meeting
from tide_mega.parallel.device import Device

_ROUNDS = 3
_SEEN_WITHIN = 10.0
"""Seconds after which a file must be seen on other nodes: shared file systems cache."""


def all_reduce(meeting: Meeting, device: Device, patience: float) -> tuple[float | None, str | None]:
    """Add up known numbers over all ranks.

    Returns:
        Bus bandwidth in bytes per second (None for one rank alone), and what was wrong.
    """
    if meeting.size == 1:
        return None, None
    try:
        dist.init_process_group(
            device.backend,
            store=dist.PrefixStore("all_reduce", meeting.store),
            rank=meeting.rank,
            world_size=meeting.size,
            timeout=timedelta(seconds=patience),
        )
        count = 2**26 if device.is_cuda else 2**20
        pattern = torch.arange(count, device=device.torch_device).remainder(7).float()
        wanted = pattern * (meeting.size * (meeting.size + 1) // 2)
        seconds = float("inf")
        for _ in range(_ROUNDS):
            numbers = pattern * (meeting.rank + 1)
            _wait_for(device)
            started = time.perf_counter()
            dist.all_reduce(numbers)
            _wait_for(device)
            seconds = min(seconds, time.perf_counter() - started)
            if not torch.equal(numbers, wanted):
                return None, "sees a wrong sum in the all-reduce over all ranks"
    except Exception as error:  # every backend has its own
        return None, f"fails in the all-reduce over all ranks: {' '.join(str(error).split())[:200]}"
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 2 * (meeting.size - 1) / meeting.size * 4 * count / seconds, None


def _wait_for(device: Device) -> None:
    if device.is_cuda:
        torch.cuda.synchronize(device.torch_device)


def mark(root: Path, token: str, rank: int) -> str | None:
    """Write this node's file in `root`; return what went wrong."""
    try:
        _file(root, token, rank).write_text(token)
    except OSError as error:
        return f"run.root={root} cannot be written: {error}"
    return None


def see(root: Path, token: str, ranks: Sequence[int]) -> str | None:
    """Look for the files of all nodes; return what is not seen."""
    deadline = time.monotonic() + _SEEN_WITHIN
    unseen = list(ranks)
    while unseen and time.monotonic() < deadline:
        unseen = [rank for rank in unseen if not _holds(_file(root, token, rank), token)]
        if unseen:
            time.sleep(0.1)
    if not unseen:
        return None
    return (
        f"does not see in run.root={root} what ranks {', '.join(map(str, unseen))} wrote: not a shared folder"
    )


def unmark(root: Path, token: str, rank: int) -> None:
    """Remove this node's file."""
    try:
        _file(root, token, rank).unlink(missing_ok=True)
    except OSError:
        return  # said already when it could not be written


def _holds(path: Path, token: str) -> bool:
    try:
        return path.read_text() == token
    except OSError:
        return False


def _file(root: Path, token: str, rank: int) -> Path:
    return root / f".health-{token}-{rank}"
