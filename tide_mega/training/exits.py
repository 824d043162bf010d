"""Exit statuses of a training process, and which of them are worth another start.

`slurm/body.sh` decides by them; the numbers there and here are compared by a test.
"""

from enum import IntEnum

from tide_mega.config.hydra_door import EXIT_CONFIG


class Exit(IntEnum):
    """What a process's exit status says."""

    DONE = 0
    ERROR = 1
    """An error nobody foresaw, with its traceback."""
    CONFIG = EXIT_CONFIG
    """A configuration that cannot run: the same start would end the same way."""
    DATA = 3
    """Data that is missing or damaged."""
    DIVERGED = 4
    """The loss or gradient is no longer a number, again and again."""
    UNHEALTHY = 5
    """The check before the run found a node that should not take part."""
    STOPPED = 75
    """Asked to stop (preemption, time limit, Ctrl-C), and the checkpoint is written. EX_TEMPFAIL of sysexits.h."""
    HUNG = 76
    """The watchdog ended a process that made no progress."""


WORTH_ANOTHER_START = frozenset({Exit.STOPPED, Exit.HUNG})
"""Statuses after which the same command can be expected to go further."""
