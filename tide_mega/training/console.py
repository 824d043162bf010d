"""What a training process prints: its own log on rank 0, and little of what the libraries would say."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator

from tide_mega.config.errors import ConfigError
from tide_mega.config.hydra_door import EXIT_CONFIG
from tide_mega.data.errors import DataError
from tide_mega.training.trainer import DivergedError

EXIT_DATA = 3
EXIT_DIVERGED = 4

_NOISE = ("megatron", "torch", "deepspeed", "apex", "numpy", "webdataset")


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
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    for library in _NOISE:
        warnings.filterwarnings("ignore", module=rf"{library}(\.|$)")


@contextlib.contextmanager
def exit_on_run_error() -> Iterator[None]:
    """Turn what a user can mend into its sentence and an exit status; anything else keeps its traceback."""
    statuses = {ConfigError: EXIT_CONFIG, DataError: EXIT_DATA, DivergedError: EXIT_DIVERGED}
    try:
        yield
    except tuple(statuses) as error:
        print(error, file=sys.stderr, flush=True)
        raise SystemExit(statuses[type(error)]) from None
