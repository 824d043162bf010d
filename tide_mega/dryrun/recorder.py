"""Records of a dry run: where the host waits, what is sent, and in which dtypes numbers are computed.

A place in the code is named by file and function, as in "tide_mega/memory/plan.py:plan_rows", so that a list of
allowed places does not depend on line numbers.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FrameType

from tide_mega.dryrun.ledger import Ledger
from tide_mega.errors import StatedError

PACKAGES = ("tide_mega/", "deepspeed/", "megatron/core/")
"""Packages whose code can be a place; the innermost of their frames counts."""
LIBRARIES = ("torch/optim/", "torch/nn/utils/", "torch/distributed/")
"""The same if no frame is of PACKAGES."""
PASSED_OVER = (
    "tide_mega/dryrun/",
    "tide_mega/parallel/groups.py",
    "deepspeed/accelerator/",
    "deepspeed/comm/",
    "deepspeed/utils/nvtx.py",
)
"""Never a place: code that all calls of a library go through."""

_names: dict[CodeType, str | None] = {}


class DryRunError(StatedError, RuntimeError):
    """The program requested something that a real device or network refuses."""


@dataclass(frozen=True, order=True)
class Wait:
    """A synchronisation: the host waits until the device has done all its work."""

    place: str
    kind: str
    """item, tolist, copy to host, copy to device, sized by data, barrier, or synchronize."""


@dataclass(frozen=True, order=True)
class Collective:
    """One kind of communication at one place."""

    place: str
    name: str
    """c10d's name."""
    members: int
    on: str
    """cuda (NCCL) or cpu (gloo)."""
    dtype: str


@dataclass
class Recorder:
    """Counters; `clear` resets them, for example for the next step."""

    waits: Counter[Wait] = field(default_factory=Counter)
    collectives: Counter[Collective] = field(default_factory=Counter)
    doubles: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Float64 results on the device, by place and operation."""
    products: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Matrix products and attention on the device, by place and dtype of the operands."""
    launches: Counter[str] = field(default_factory=Counter)
    """Triton launches, by kernel."""
    ledger: Ledger | None = None
    """Accounts of memory, work and messages, if wanted; `clear` leaves it as it is."""

    def wait(self, kind: str) -> None:
        """Record that the host waits here."""
        self.waits[Wait(place(), kind)] += 1

    def clear(self) -> None:
        """Reset all counters."""
        for counter in (self.waits, self.collectives, self.doubles, self.products, self.launches):
            counter.clear()


_active: list[Recorder] = []


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Context in which `active` and `note_wait` refer to this recorder."""
    _active.append(recorder)
    try:
        yield
    finally:
        _active.pop()


def active() -> Recorder | None:
    """Return the recorder of the running dry run, or None."""
    return _active[-1] if _active else None


def note_wait(kind: str) -> None:
    """Record a wait, if a dry run is running."""
    if _active:
        _active[-1].wait(kind)


def place() -> str:
    """Return the name of the innermost calling function in PACKAGES, else in LIBRARIES."""
    return place_and_line()[0]


def place_and_line() -> tuple[str, str]:
    """Return the same, and the line in it, as in "tide_mega/memory/plan.py:41"."""
    frame: FrameType | None = sys._getframe(1)
    library: tuple[str, str] | None = None
    while frame is not None:
        name = _name(frame.f_code)
        if name is not None:
            found = name, f"{name.partition(':')[0]}:{frame.f_lineno}"
            if name.startswith(PACKAGES):
                return found
            library = library or found
        frame = frame.f_back
    return library or ("elsewhere", "elsewhere")


_WITHIN = re.compile(r"(\.<locals>)?\.<(listcomp|setcomp|dictcomp|genexpr)>")
"""Comprehensions: their place is the enclosing function, in which Python 3.12 runs most of them."""


def _name(code: CodeType) -> str | None:
    if code not in _names:
        _names[code] = next(
            (
                f"{package}{code.co_filename.rsplit(package, 1)[1]}:{_WITHIN.sub('', code.co_qualname)}"
                for package in (*PACKAGES, *LIBRARIES)
                if package in code.co_filename and not any(p in code.co_filename for p in PASSED_OVER)
            ),
            None,
        )
    return _names[code]
