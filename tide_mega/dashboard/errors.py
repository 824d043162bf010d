"""What can go wrong with a dashboard, and how its tools end then."""

import sys
from collections.abc import Callable

from tide_mega.config.errors import ConfigError, StatedError


class DashboardError(StatedError, ValueError):
    """A run that cannot be read, or a workspace that cannot be saved; one sentence that says what to do."""


def status_of(work: Callable[[], None]) -> int:
    """Do a tool's work; return its exit status: 0, 1 for a run or W&B that cannot be used, 2 for a bad option."""
    try:
        work()
    except (ConfigError, DashboardError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0
