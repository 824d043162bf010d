"""What a training process prints: its own log, on rank 0, and its last word."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import NoReturn

from tide_mega.config.errors import StatedError, printable
from tide_mega.config.exits import Exit
from tide_mega.config.urls import without_credentials
from tide_mega.training.interrupt import RunStoppedError


class _Formatter(logging.Formatter):
    """Escapes control characters, indents what follows a line break, and takes credentials out of URLs."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return "\n    ".join(map(printable, super().formatMessage(record).split("\n")))

    def format(self, record: logging.LogRecord) -> str:
        return without_credentials(super().format(record))


def set_up_logging() -> None:
    """Log this package's messages to standard output, on rank 0; other ranks log warnings and worse.

    URLs are logged without their credentials.
    """
    rank = int(os.environ.get("RANK", "0"))
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_Formatter(f"%(asctime)s {prefix}%(message)s", "%H:%M:%S"))
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
    """Turn what a user can mend into its sentence and its exit status; anything else keeps its traceback."""
    try:
        yield
    except RunStoppedError as stopped:
        logging.getLogger("tide_mega").info("%s", stopped)
        leave_at_once(Exit.STOPPED)
    except StatedError as error:
        print(error, file=sys.stderr, flush=True)
        raise SystemExit(error.exit_status) from None
