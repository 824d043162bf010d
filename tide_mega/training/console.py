"""What a training process prints: its own log, on rank 0, and its last word."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import NoReturn

from tide_mega.config.errors import ConfigError
from tide_mega.data.errors import DataError
from tide_mega.training.exits import Exit
from tide_mega.training.interrupt import RunStoppedError
from tide_mega.training.trainer import DivergedError

_STATUSES = {ConfigError: Exit.CONFIG, DataError: Exit.DATA, DivergedError: Exit.DIVERGED}


def set_up_logging() -> None:
    """Log this package's messages to standard output, on rank 0; other ranks log warnings and worse."""
    rank = int(os.environ.get("RANK", "0"))
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", "%H:%M:%S"))
    logger = logging.getLogger("tide_mega")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)


def leave_at_once(status: Exit) -> NoReturn:
    """End the process without its libraries' exit hooks.

    A signal of SLURM goes to every process of a task, W&B's service too, for which W&B's hook then waits until
    SLURM kills the task: the exit status would be lost.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextlib.contextmanager
def exit_on_run_error() -> Iterator[None]:
    """Turn what a user can mend into its sentence and an exit status; anything else keeps its traceback."""
    try:
        yield
    except RunStoppedError as stopped:
        logging.getLogger("tide_mega").info("%s", stopped)
        leave_at_once(Exit.STOPPED)
    except tuple(_STATUSES) as error:
        print(error, file=sys.stderr, flush=True)
        raise SystemExit(_STATUSES[type(error)]) from None
