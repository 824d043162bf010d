"""Exit statuses of the project's commands, and which of them are worth another start.

`slurm/body.sh` decides by them; the numbers there and here are compared by a test.
"""

from enum import IntEnum


class Exit(IntEnum):
    """What a process's exit status says."""

    DONE = 0
    ERROR = 1
    """An error nobody foresaw, with its traceback; of a tool also what it was asked to look at being at fault."""
    CONFIG = 2
    """A configuration that cannot run: the same start would end the same way."""
    DATA = 3
    """Data that is missing or damaged."""
    DIVERGED = 4
    """The loss or gradient is no longer a number, again and again."""
    UNHEALTHY = 5
    """The check before the run found a node that should not take part."""
    CHECKPOINT = 6
    """A checkpoint could not be written (a full disk), or none of those there can be used."""
    TAKEN = 7
    """Another process is at work in the run folder."""
    SWEEP = 8
    """Points of a sweep failed; the others are done, and the summary says with what status each of them ended."""
    STOPPED = 75
    """Asked to stop (preemption, time limit, Ctrl-C), and the checkpoint is written. EX_TEMPFAIL of sysexits.h."""
    HUNG = 76
    """The watchdog ended a process that made no progress."""


WORTH_ANOTHER_START = frozenset({Exit.STOPPED, Exit.HUNG})
"""Statuses after which the same command can be expected to go further."""
