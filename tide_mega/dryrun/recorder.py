"""What a dry run notes: where the host waits, what is sent, which numbers are computed with.

A place in the code is named by file and function, as in "tide_mega/memory/plan.py:plan_rows", so that a list of
allowed places outlives the lines around them.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FrameType

from tide_mega.config.errors import StatedError

PACKAGES = ("tide_mega/", "deepspeed/", "megatron/core/")
"""Whose code can be a place; the innermost frame of theirs counts."""
LIBRARIES = ("torch/optim/", "torch/nn/utils/", "torch/distributed/")
"""The same where no frame is of PACKAGES."""
PASSED_OVER = ("tide_mega/dryrun/", "deepspeed/accelerator/", "deepspeed/comm/", "deepspeed/utils/nvtx.py")
"""Never a place: what all of a library's calls go through."""

_names: dict[CodeType, str | None] = {}


class DryRunError(StatedError, RuntimeError):
    """The program asked for what a real device or network refuses."""


@dataclass(frozen=True, order=True)
class Wait:
    """The host stops until the device has done all that it was given."""

    place: str
    kind: str
    """item, tolist, copy to host, copy to device, sized by data, barrier, or synchronize."""


@dataclass(frozen=True, order=True)
class Collective:
    """One kind of communication at one place."""

    place: str
    name: str
    """c10d's."""
    members: int
    on: str
    """cuda (NCCL) or cpu (gloo)."""
    dtype: str


@dataclass
class Recorder:
    """Counts; `clear` starts them again, for the next step say."""

    waits: Counter[Wait] = field(default_factory=Counter)
    collectives: Counter[Collective] = field(default_factory=Counter)
    doubles: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Float64 results on the device, by place and operation."""
    products: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Matrix products and attention on the device, by place and dtype of what is multiplied."""
    launches: Counter[str] = field(default_factory=Counter)
    """Triton launches, by kernel."""

    def wait(self, kind: str) -> None:
        """Note that the host waits here."""
        self.waits[Wait(place(), kind)] += 1

    def clear(self) -> None:
        """Begin anew."""
        for counter in (self.waits, self.collectives, self.doubles, self.products, self.launches):
            counter.clear()


_active: list[Recorder] = []


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Have `active` and `note_wait` mean this recorder."""
    _active.append(recorder)
    try:
        yield
    finally:
        _active.pop()


def active() -> Recorder | None:
    """Return the recorder of the dry run under way."""
    return _active[-1] if _active else None


def note_wait(kind: str) -> None:
    """Note a wait, if a dry run is under way."""
    if _active:
        _active[-1].wait(kind)


def place() -> str:
    """Name the innermost function, of those that called this, of PACKAGES, else of LIBRARIES."""
    frame: FrameType | None = sys._getframe(1)
    library: str | None = None
    while frame is not None:
        name = _name(frame.f_code)
        if name is not None:
            if name.startswith(PACKAGES):
                return name
            library = library or name
        frame = frame.f_back
    return library or "elsewhere"


_WITHIN = re.compile(r"(\.<locals>)?\.<(listcomp|setcomp|dictcomp|genexpr)>")
"""Comprehensions: a place is the function around them, in which Python 3.12 runs most of them."""


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
