"""The package's logger, which entry points called in a test's own process set up for a terminal."""

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def package_log_kept() -> Iterator[None]:
    """Leave the package's logger afterwards as it was before."""
    logger = logging.getLogger("tide_mega")
    handlers, propagates, level = list(logger.handlers), logger.propagate, logger.level
    try:
        yield
    finally:
        logger.handlers, logger.propagate = handlers, propagates
        logger.setLevel(level)
