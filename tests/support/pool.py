"""Warm worker processes joined by gloo, shared by all distributed tests of a session.

Importing the stack costs seconds a process, so a pool starts once and runs many functions. A function is
given by reference (a module-level function of an importable module); every worker calls it with the same
arguments and the list of their return values, by rank, comes back.
"""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 90


class WorkerError(AssertionError):
    """What a worker raised, with its traceback."""


def _work(rank: int, size: int, store_path: str, channel: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(size), GLOO_SOCKET_IFNAME="lo")
    from tide_mega.parallel import groups, megatron_cpu

    megatron_cpu.install()
    dist.init_process_group("gloo", store=dist.FileStore(store_path, size), rank=rank, world_size=size)
    while True:
        task = channel.recv()
        if task is None:
            break
        function, args = task
        try:
            channel.send(("ok", function(*args)))
        except BaseException:
            channel.send(("error", traceback.format_exc()))
    groups.stop_distributed()


class WorkerPool:
    """`size` processes in one gloo group."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory(prefix="tide-pool-")
        self._workers: list[Any] = []
        self._channels: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call `function(*args)` in every worker and return the results by rank.

        Raises:
            WorkerError: a worker raised, died or did not answer in time; the pool then starts afresh, since
                the others may wait in a collective for ever.
        """
        self._start()
        for channel in self._channels:
            channel.send((function, args))
        results, failures = [], []
        for rank, channel in enumerate(self._channels):
            try:
                answered = channel.poll(5 if failures else TIMEOUT_SECONDS)
                status, value = channel.recv() if answered else ("error", "no answer in time")
            except EOFError:
                status, value = "error", "the process died"
            if status == "ok":
                results.append(value)
            else:
                failures.append(f"rank {rank}: {value}")
        if failures:
            self.close(kill=True)
            raise WorkerError("\n".join(failures))
        return results

    def _start(self) -> None:
        if self._workers:
            return
        context = multiprocessing.get_context("spawn")
        store = str(Path(self._folder.name) / f"store-{os.urandom(4).hex()}")
        for rank in range(self.size):
            here, there = context.Pipe()
            worker = context.Process(target=_work, args=(rank, self.size, store, there), daemon=True)
            worker.start()
            there.close()
            self._workers.append(worker)
            self._channels.append(here)

    def close(self, *, kill: bool = False) -> None:
        """End the workers."""
        for worker, channel in zip(self._workers, self._channels, strict=True):
            if kill:
                worker.kill()
            else:
                channel.send(None)
        for worker in self._workers:
            worker.join(20)
        self._workers, self._channels = [], []
