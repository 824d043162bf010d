"""What a training process prints: its own log, on rank 0, and its final error message."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import NoReturn

from tide_mega.errors import Exit, StatedError, printable, without_credentials
from tide_mega.run.stop import RunStoppedError


class _Formatter(logging.Formatter):
    """Escapes control characters, indents continuation lines, and removes credentials from URLs."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return "\n    ".join(map(printable, super().formatMessage(record).split("\n")))

    def format(self, record: logging.LogRecord) -> str:
        return without_credentials(super().format(record))


def set_up_logging() -> None:
    """Log this package's messages to standard output on rank 0; other ranks log warnings and above.

    URLs are logged without credentials.
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
    """End the process without running exit hooks of libraries.

    SLURM's signal reaches every process of a task, W&B's service too, for which W&B's exit hook then waits until
    SLURM kills the task, and the exit status would be lost.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextlib.contextmanager
def exit_on_run_error() -> Iterator[None]:
    """Turn a `StatedError` into its message and exit status; any other exception keeps its traceback."""
    try:
        yield
    except RunStoppedError as stopped:
        logging.getLogger("tide_mega").info("%s", stopped)
        leave_at_once(Exit.STOPPED)
    except StatedError as error:
        print(error, file=sys.stderr, flush=True)
        raise SystemExit(error.exit_status) from None
