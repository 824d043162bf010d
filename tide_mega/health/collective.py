"""Watched all-reduces of known numbers in group after group: a hang is detected and does not end the process."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from tide_mega.health.rounds import Group
from tide_mega.parallel.device import Device

TIMES = 3
"""All-reduces per group, of which the fastest counts."""
_LENGTHS = {"cuda": 2**26, "cpu": 2**20}
"""Numbers per all-reduce, by device type."""
_SCALES = 7
_EXACT = 2**24
"""All integers up to here are exact in fp32."""


@dataclass
class Outcome:
    """What a process observed in its groups, by group name."""

    rates: dict[str, float] = field(default_factory=dict)
    """Bus bandwidth in bytes per second, of groups that succeeded."""
    failures: dict[str, str] = field(default_factory=dict)
    """What went wrong in the other groups."""
    stuck: str | None = None
    """The group in which this process was when the time was up; None if it finished."""


def run_rounds(
    groups: Sequence[Group],
    rank: int,
    device: Device,
    store: dist.Store,
    *,
    limit: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Outcome:
    """All-reduce known numbers in one group after the other, in a separate thread.

    A thread stuck in a collective cannot be ended. If the outcome says so, this process must not use its GPU
    again and must exit by `os._exit`.

    Args:
        groups: of this process, in the same order on all processes.
        rank: of this process.
        device: of this process.
        store: rendezvous of the groups, in which every rank also records the groups that it has entered. Only this
            thread may use it, since a wait blocks all other use of the same connection.
        limit: seconds for all groups together.
        clock: monotonic time in seconds.
    """
    # This function detects a hanging collective itself: NCCL's watchdog would abort the process without naming the
    # node. Read when the first group is created.
    os.environ.update(TORCH_NCCL_ASYNC_ERROR_HANDLING="0", TORCH_NCCL_ENABLE_MONITORING="0")
    outcome = Outcome()

    def work() -> None:
        if device.is_cuda:
            torch.cuda.set_device(device.torch_device)  # the current device is per thread
        for group in groups:
            outcome.stuck = group.name
            store.set(entered(group, rank), "")
            try:
                outcome.rates[group.name] = _measure(group, rank, device, store, 10 * limit, clock)
            except Exception as error:  # every backend has its own exceptions
                outcome.failures[group.name] = " ".join(str(error).split())[:200] or type(error).__name__
            finally:
                if dist.is_initialized():
                    dist.destroy_process_group()
        outcome.stuck = None

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(limit)
    # A copy: the thread may still finish while this is being reported.
    return Outcome(dict(outcome.rates), dict(outcome.failures), outcome.stuck if thread.is_alive() else None)


def entered(group: Group, rank: int) -> str:
    """Return the key under which a rank records that it is about to enter a group's all-reduces."""
    return f"entered/{group.name}/{rank}"


def _measure(
    group: Group, rank: int, device: Device, store: dist.Store, timeout: float, clock: Callable[[], float]
) -> float:
    """Return the bus bandwidth, in bytes per second.

    Raises:
        ArithmeticError: a sum is wrong.
        Exception: any error of the backend.
    """
    size, index = len(group.ranks), group.ranks.index(rank)
    dist.init_process_group(
        device.backend,
        store=dist.PrefixStore(f"group/{group.name}", store),
        rank=index,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )
    length = _LENGTHS[device.torch_device.type]
    given = spread(numbers_of(index, size), length, device.torch_device)
    wanted = spread(sum_of(size), length, device.torch_device)
    seconds, is_right = float("inf"), True
    for _ in range(TIMES):
        numbers = given.clone()
        _wait_for(device)
        started = clock()
        dist.all_reduce(numbers)
        _wait_for(device)
        seconds = min(seconds, clock() - started)
        is_right = is_right and torch.equal(numbers, wanted)
    if not is_right:  # not before the others, whose sums may be right, have completed theirs
        raise ArithmeticError("a wrong sum")
    return 2 * (size - 1) / size * numbers.nbytes / seconds


def numbers_of(index: int, size: int) -> Tensor:
    """Return what a member of a group contributes [7 * bits]: the binary digits of index + 1, times 1 to 7.

    No two members contribute the same, none contributes only zeros, and sums over 2 million members are still
    integers that fp32 holds exactly, in any order of addition.

    Raises:
        ValueError: the group is too large for exact sums.
    """
    if _SCALES * size > _EXACT:
        raise ValueError(
            f"the sums over {size} ranks are not exact in fp32: at most {_EXACT // _SCALES} ranks"
        )
    digits = [(index + 1) >> bit & 1 for bit in range(size.bit_length())]
    return torch.outer(torch.arange(1.0, _SCALES + 1), torch.tensor(digits, dtype=torch.float32)).flatten()


def sum_of(size: int) -> Tensor:
    """Return the sum of all members' numbers [7 * bits], computed in integers."""
    counts = [_ones(size, bit) for bit in range(size.bit_length())]
    scales = torch.arange(1, _SCALES + 1, dtype=torch.int64)
    return torch.outer(scales, torch.tensor(counts, dtype=torch.int64)).flatten().float()


def _ones(size: int, bit: int) -> int:
    """Return how many of the numbers 1 to `size` have a binary digit set."""
    whole, rest = divmod(size + 1, 2 ** (bit + 1))
    return whole * 2**bit + max(0, rest - 2**bit)


def spread(period: Tensor, length: int, device: torch.device) -> Tensor:
    """Repeat a period [P] to `length` numbers."""
    return period.to(device).repeat(-(-length // len(period)))[:length].contiguous()


def _wait_for(device: Device) -> None:
    if device.is_cuda:
        torch.cuda.synchronize(device.torch_device)
