"""How a tool ends: with its status, an error's sentence, or in silence where nobody reads (`--help | head`)."""

import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from tide_mega.config.errors import StatedError, of_the_place

UNREAD = 128 + 13
"""Exit status of a command whose reader has gone: a shell's for SIGPIPE, which Python ignores."""


def tool_entry(main: Callable[[], int | None]) -> NoReturn:
    """Run a tool and exit with the status that it returns, quietly where nobody reads its output any more.

    A `StatedError` that the tool leaves to its caller becomes its sentence on stderr and its class's status; so
    does an error of the file system that the place of a file explains.
    """
    with quiet_when_unread():
        try:
            status = main()
        except (StatedError, OSError) as error:
            stated = of_the_place(error) if isinstance(error, OSError) else error
            if stated is None:
                raise
            print(stated, file=sys.stderr, flush=True)
            status = stated.exit_status
    sys.exit(status)


@contextmanager
def quiet_when_unread() -> Iterator[None]:
    """Turn a write to a standard output that nobody reads into the end of this process, with status `UNREAD`.

    Output that is still buffered is written before this ends: at the interpreter's exit it would be too late.
    A pipe to anything else that breaks stays an error.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        if not _is_unread():
            raise
        # The interpreter flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(UNREAD) from None


def _is_unread() -> bool:
    """Whether standard output is a pipe without readers."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
    except (OSError, ValueError, AttributeError):  # not a file of the system
        return False
