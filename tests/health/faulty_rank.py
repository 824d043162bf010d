"""One process of a check in which rank 1 has a fault; arguments RANK SIZE FAULT ROOT LIMIT."""

import itertools
import os
import sys
import threading
from pathlib import Path

import torch.distributed as dist

from tests.support.runs import tiny
from tide_mega.health import check as check_module
from tide_mega.health import collective
from tide_mega.parallel.groups import World
from tide_mega.run.console import leave_at_once

FAULTS = ("none", "slow", "wrong", "stays away", "hangs", "dies")


def bring_about(fault: str, rank: int) -> None:
    """Give this rank its fault, and every rank a made-up clock."""
    rounds, reduce, entered = check_module.run_rounds, dist.all_reduce, collective.entered
    never = threading.Event()
    ticks = itertools.count()
    second = 1.0 if (fault, rank) == ("slow", 1) else 1e-3  # what an all-reduce seems to take

    def run_rounds(*args, **kwargs):
        return rounds(*args, **kwargs, clock=lambda: second * next(ticks))

    def all_reduce(numbers):
        if fault == "hangs":
            never.wait()
        if fault == "dies":
            os._exit(9)
        reduce(numbers)
        if fault == "wrong":
            numbers[12345] += 1

    def stay_away(group, rank):
        return never.wait() if len(group.nodes) == 3 else entered(group, rank)

    check_module.run_rounds = run_rounds
    if rank == 1:
        dist.all_reduce = all_reduce
        if fault == "stays away":
            collective.entered = stay_away


def main(rank: int, size: int, fault: str, root: str, limit: float) -> None:
    assert fault in FAULTS
    bring_about(fault, rank)
    config = tiny(Path("data"), Path(root))
    config.cluster.min_network_gbs = 1.0
    patience = 15.0 if fault == "dies" else 60.0
    leave_at_once(0 if check_module.check(config, World(rank, size, 0, 1), patience, limit) else 5)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], float(sys.argv[5]))
