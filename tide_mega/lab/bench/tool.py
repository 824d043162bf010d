"""How the benchmark tools end: measure, print the table, write JSON and figure, return the exit status."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tide_mega.config.command_line import status_of
from tide_mega.errors import Exit
from tide_mega.files import write_json

Found = TypeVar("Found")


def run_tool(
    measure: Callable[[], Found],
    show: Callable[[Found], str],
    out: str | None,
    *,
    plot: Callable[[Found], object] | None = None,
    failures: tuple[type[Exception], ...] = (),
) -> int:
    """Run a benchmark and show what it found.

    Args:
        measure: returns JSON values; its ConfigError is printed as a sentence.
        show: makes the text for standard output.
        out: JSON file to write, if any.
        plot: draws the result, after `out` is written.
        failures: other exceptions of `measure` that are printed as a sentence instead of a traceback.

    Returns:
        The exit status: 0, 1 after one of `failures`, 2 for a bad option.
    """
    measured: list[Found] = []
    status = status_of(lambda: measured.append(measure()), *failures)
    if status != Exit.DONE:
        return status
    (found,) = measured
    print(show(found))
    if out is not None:
        write_json(Path(out), found)
    if plot is not None:
        plot(found)
    return status
