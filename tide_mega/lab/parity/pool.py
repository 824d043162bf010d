"""Warm worker processes joined by gloo, or by NCCL on GPUs.

Importing the stack takes seconds per process, so a pool starts once and runs many functions. A function is passed
by reference: it must be at module level in an importable module. Every worker calls it with the same arguments;
the return values come back as a list, by rank.
"""

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.util import Finalize
from pathlib import Path
from types import TracebackType
from typing import Any

from tide_mega.errors import StatedError

_PR_SET_PDEATHSIG = 1
LAST_WORDS_SECONDS = 5.0
"""Time for the other workers to answer once one has failed; they may be waiting for it forever."""


class WorkerError(StatedError, RuntimeError):
    """Workers raised (with their tracebacks), died, or did not answer in time."""

    has_lines = True


def default_timeout(size: int) -> float:
    """Seconds that `size` workers may take to start, or for one function, on a machine of few cores."""
    return 60.0 + 30.0 * size


def _work(rank: int, size: int, kind: str, store_path: str, channel: Connection, rests: bool) -> None:
    if rests:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a stopped process sees no closed channel
    os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(size))
    # Warnings that every process would repeat: missing optional packages, deprecations within libraries.
    warnings.filterwarnings("ignore", module=r"(megatron|torch|deepspeed)(\.|$)")
    import torch
    import torch.distributed as dist

    from tide_mega.parallel import groups, megatron_cpu
    from tide_mega.parallel.device import choose_device

    torch.set_num_threads(1)
    device = choose_device(kind, rank)
    megatron_cpu.redirect(to_cpu=not device.is_cuda)
    dist.init_process_group(
        device.backend, store=dist.FileStore(store_path, size), rank=rank, world_size=size
    )
    channel.send(("ok", None))
    gc.freeze()  # imported objects stay: garbage collection need only scan the rest
    with contextlib.suppress(EOFError):  # the parent is gone
        while (task := channel.recv()) is not None:
            function, args = task
            try:
                channel.send(("ok", function(*args)))
            except Exception:
                channel.send(("error", traceback.format_exc()))
            gc.collect()  # process groups kept alive by cycles, whose threads would poll forever
    groups.stop_distributed()


class WorkerPool:
    """`size` processes in one group, started at the first use.

    A context manager: leaving it ends the workers.
    """

    def __init__(
        self, size: int, *, timeout: float | None = None, device: str = "cpu", rests: bool = False
    ) -> None:
        """Describe the pool.

        Args:
            size: processes.
            timeout: seconds that starting, and each call, may take; None means `default_timeout(size)`.
            device: cpu or cuda, a GPU a worker; a process keeps the kind of device its first engine was built on.
            rests: whether workers are stopped (SIGSTOP) between calls. An idle gloo group polls, and a few large
                pools of idle workers take a core.
        """
        self._rests = rests
        self.size, self.device = size, device
        self.timeout = default_timeout(size) if timeout is None else timeout
        self._folder: tempfile.TemporaryDirectory | None = None
        self._workers: list[Any] = []
        self._channels: list[Connection] = []

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(kill=error is not None)

    def start(self) -> None:
        """Start the workers, unless they run, and wait until all have joined.

        Raises:
            WorkerError: a worker died or did not join in time.
        """
        if self._workers:
            return
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="tide-pool-")
        store = str(Path(self._folder.name) / "store")
        for rank in range(self.size):
            here, there = context.Pipe()
            worker = context.Process(
                target=_work, args=(rank, self.size, self.device, store, there, self._rests), daemon=True
            )
            worker.start()
            there.close()
            self._workers.append(worker)
            self._channels.append(here)
        if self._rests:
            # Before multiprocessing ends daemons with a signal that a stopped one would never take.
            pids = [worker.pid for worker in self._workers]
            Finalize(self, _signal_all, args=(pids, signal.SIGCONT), exitpriority=10)
        self._answers(f"of its start in {self.timeout:g} s")

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call `function(*args)` in every worker and return the results by rank.

        Raises:
            WorkerError: a worker raised, died or did not answer in time; the pool then starts afresh at its next
                call, since the others may wait in a collective forever.
        """
        self.start()
        self._signal(signal.SIGCONT)
        for channel in self._channels:
            with contextlib.suppress(BrokenPipeError):  # treated as a death below
                channel.send((function, args))
        return self._answers(f"in {self.timeout:g} s")

    def close(self, *, kill: bool = False) -> None:
        """End the workers."""
        self._signal(signal.SIGCONT)
        for worker, channel in zip(self._workers, self._channels, strict=True):
            if kill:
                worker.kill()
            else:
                with contextlib.suppress(BrokenPipeError):
                    channel.send(None)
        for worker, channel in zip(self._workers, self._channels, strict=True):
            worker.join(20)
            if worker.is_alive():
                worker.kill()
                worker.join()
            channel.close()
        self._workers, self._channels = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _signal(self, number: int) -> None:
        if self._rests:
            _signal_all([worker.pid for worker in self._workers], number)

    def _answers(self, when: str) -> list[Any]:
        """Wait for every worker; after a first failure give the others a moment, then end all."""
        deadline = time.monotonic() + self.timeout
        waiting: dict[Any, int] = {channel: rank for rank, channel in enumerate(self._channels)}
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for channel in ready:
                rank = waiting.pop(channel)
                try:
                    status, value = self._channels[rank].recv()
                except (EOFError, OSError):
                    status, value = "error", "the process died"
                if status == "ok":
                    results[rank] = value
                else:
                    failures[rank] = str(value)
                    deadline = min(deadline, time.monotonic() + LAST_WORDS_SECONDS)
        if not failures and not waiting:
            self._signal(signal.SIGSTOP)
            return [results[rank] for rank in range(self.size)]
        late = "after another's failure" if failures else when
        failures |= dict.fromkeys(waiting.values(), f"no answer {late}")
        self.close(kill=True)
        raise WorkerError(_by_text(failures))


def _signal_all(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _by_text(failures: dict[int, str]) -> str:
    """Merge equal failures, each after the ranks it happened on."""
    ranks: dict[str, list[str]] = {}
    for rank in sorted(failures):
        ranks.setdefault(failures[rank].rstrip(), []).append(str(rank))
    return "\n".join(f"rank{'s' * (len(n) > 1)} {', '.join(n)}: {text}" for text, n in ranks.items())
