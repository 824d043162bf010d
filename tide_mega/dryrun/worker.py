"""A process for dry runs: it imports the stack once, and each run is a fresh fork of it."""

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from types import TracebackType
from typing import Any

from tide_mega.config.command_line import hush_libraries
from tide_mega.errors import StatedError

STACK = (
    *("tide_mega.dryrun.rank", "tide_mega.kernels.mix.triton", "tide_mega.kernels.norm_router.triton"),
    *("torch._decomp", "torch._refs", "torch._inductor.fx_passes.joint_graph"),
)
"""Modules imported before the first fork, which each fork would otherwise import anew during its step."""
TIMEOUT = 300.0
"""Time limit in seconds for a run, and for the start."""


class DryRunFailedError(StatedError, RuntimeError):
    """A run raised an exception (with its traceback), died, or timed out."""

    has_lines = True


class DryWorker:
    """Context manager that runs functions, each in a process of its own with a CUDA card and no other rank."""

    def __init__(self, timeout: float = TIMEOUT) -> None:
        """Wait at most `timeout` seconds for each answer."""
        self._timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Any = None

    def __enter__(self) -> "DryWorker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return `function(*args)`, where `function` is a module-level function of an importable module.

        Raises:
            DryRunFailedError: it raised, died or timed out; the worker continues, or is restarted.
        """
        if self._channel is None:
            self._start()
        self._channel.send((function, args))
        try:
            if not self._channel.poll(self._timeout):
                raise DryRunFailedError(f"{function.__name__} did not answer in {self._timeout:g} s")
            succeeded, value = self._channel.recv()
        except (EOFError, OSError, DryRunFailedError) as error:
            self.close()
            raise error if isinstance(error, DryRunFailedError) else DryRunFailedError("died") from error
        if not succeeded:
            raise DryRunFailedError(value)
        return value

    def _start(self) -> None:
        # Not multiprocessing: it would import the caller's main module, and with it megatron-core, too early.
        self._channel, there = Pipe()
        command = f"from tide_mega.dryrun import worker; worker.serve({there.fileno()})"
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "OMP_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", command],
            pass_fds=[there.fileno()],
            env=environment,
            start_new_session=True,
            stdout=subprocess.DEVNULL,  # DeepSpeed prints which of its extensions this machine cannot compile
        )
        there.close()

    def close(self) -> None:
        """End the process and any running function."""
        if self._channel is not None and self._process is not None:
            self._channel.close()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = self._channel = None


def serve(descriptor: int) -> None:
    """Serve requests from the other end of a connection until it is closed."""
    channel: Any = Connection(descriptor)
    hush_libraries()
    import torch

    from tide_mega.dryrun import cuda

    torch.set_num_threads(1)  # no threads, which a fork would lose
    cuda.install()
    from tide_mega.parallel.device import choose_device
    from tide_mega.parallel.engine import load_deepspeed

    deepspeed = load_deepspeed(choose_device("cuda", 0))
    for module in (*STACK, f"{deepspeed.__name__}.compile.backend"):
        with contextlib.suppress(ImportError):  # a fork that needs it will report it
            importlib.import_module(module)
    with contextlib.suppress(EOFError):  # the parent is gone
        while True:
            function, args = channel.recv()
            child = os.fork()
            if child == 0:
                _answer(channel, function, args)
            _, status = os.waitpid(child, 0)
            if status != 0:
                channel.send((False, f"{function.__name__}: the process died with status {status}"))


def _answer(channel: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Run one function in the fork, and exit without the interpreter's cleanup."""
    status = 1
    try:
        try:
            answer = (True, function(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        channel.send(answer)
        status = 0
    finally:
        os._exit(status)
