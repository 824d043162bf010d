"""A process of its own in which triton's kernels run in triton's interpreter, on CPU tensors."""

import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any


class Interpreter:
    """Runs module-level functions in one worker, started at the first call.

    The interpreter is chosen when triton is imported, so a process that has imported triton cannot have it, and
    one that has it cannot compile.
    """

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_start)

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call `function(*args)` in the worker; what it raises is raised here."""
        return self._pool.submit(function, *args).result(timeout=300)

    def close(self) -> None:
        """End the worker."""
        self._pool.shutdown()


def _start() -> None:
    if "triton" in sys.modules:
        raise RuntimeError("triton was imported before the interpreter could be chosen.")
    os.environ.update(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    import torch

    torch.set_num_threads(1)
