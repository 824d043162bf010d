"""Feeds the commands generated inputs: each must end in success, or in a sentence and a documented exit status.

    python tools/fuzz_inputs.py
    python tools/fuzz_inputs.py cases=1000 seed=7 kinds=words,files
    python tools/fuzz_inputs.py seed=7 only=123

Kinds of cases (tide_mega/lab/bench/odd_inputs.py): `words` of a configuration, `tools` and their arguments,
`files` of text to prepare, `folders` of prepared data and of runs with something cut, overwritten, removed or
added. Everything happens in a temporary folder and in this one process; the trainings take a step or two, and
nothing accesses the network.

A case fails if an exception escapes, if more than one sentence is on standard error, if the status is none of
tide_mega/errors.py, or if it takes longer than `seconds`. A failed case is named with its output; `only` with its
number and the same seed and kinds repeats it. Exit status: 0 no case failed, 1 some did, 2 wrong arguments.
"""

import contextlib
import importlib
import importlib.util
import io
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import FrameType
from typing import Any

from tide_mega.config.command_line import hush_libraries, tool_entry
from tide_mega.config.hydra_door import hydra_entry, parse_tool_cli
from tide_mega.errors import Exit, refuse
from tide_mega.lab.bench.odd_inputs import KINDS, SMALL_RUN, Case, Material
from tide_mega.lab.bench.text import prepare_own_text

INTERRUPTED = 130
_PROGRESS = re.compile(r"\d+%\||it/s\]|B/s\]")


@dataclass
class Options:
    """Which cases to run."""

    cases: int = 300
    """How many."""
    seed: int = 0
    """Of everything that is generated."""
    kinds: list[str] = field(default_factory=lambda: list(KINDS))
    """words, tools, files, folders, or some of them, in turn."""
    only: int | None = None
    """Number of the one case to run."""
    seconds: int = 60
    """How long a case may take."""


@dataclass(frozen=True)
class Ending:
    """How a command ended."""

    status: int
    stdout: str
    stderr: str
    escaped: str = ""
    """Traceback of an exception that escaped."""


class TooLongError(BaseException):
    """A case exceeded its time; a type that no handler of the commands catches."""


def complaint(ending: Ending) -> str | None:
    """Return what is wrong with the end of a command; None if nothing is."""
    if ending.escaped:
        return f"an exception escaped: {ending.escaped.strip().splitlines()[-1]}"
    if "Traceback (most recent call last)" in ending.stdout + ending.stderr:
        return "a traceback was printed"
    if ending.status not in (*Exit, INTERRUPTED):
        return f"status {ending.status} is not documented"
    said = [line for line in ending.stderr.splitlines() if line.strip() and not _PROGRESS.search(line)]
    is_sweep = ending.status == Exit.SWEEP
    if ending.status and not is_sweep and len(said) > 1:
        return f"{len(said)} lines on standard error"
    if ending.status and not said and not ending.stdout.strip():
        return f"status {ending.status} without a word"
    return None


def end_of(case: Case, seconds: int) -> Ending:
    """Run a command in this process and return how it ended."""
    out, err, escaped, status = io.StringIO(), io.StringIO(), "", 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _alarm(seconds):
        try:
            _entry(case)()
        except SystemExit as leaving:
            status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        except (Exception, TooLongError):
            escaped, status = traceback.format_exc(), Exit.ERROR
    return Ending(status, out.getvalue(), err.getvalue(), escaped)


def _entry(case: Case) -> Callable[[], None]:
    if case.command == "train":
        from tide_mega.train import main

        sys.argv[1:] = case.words
        return partial(hydra_entry, main)
    tool = _module(case.command)
    return lambda: tool_entry(lambda: tool.main(list(case.words)))


@cache
def _module(name: str) -> Any:
    path = Path(__file__).with_name(f"{name}.py")
    if not path.exists():
        return importlib.import_module(f"tide_mega.{name}")
    spec = importlib.util.spec_from_file_location(f"fuzzed_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclass help is read from the module's source
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _alarm(seconds: int) -> Iterator[None]:
    def ring(_number: int, _frame: FrameType | None) -> None:
        raise TooLongError(f"nothing for {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def make_material(folder: Path) -> Material:
    """Prepare text and train on it; the cases start from the results."""
    data = prepare_own_text(folder, 640)
    words = [*SMALL_RUN, f"data.path={data}", f"run.root={folder}/runs", "run.name=sound"]
    ending = end_of(Case("train", words), seconds=300)
    assert ending.status == 0, ending
    return Material(folder / "text", data, folder / "runs" / "sound")


def check(options: Options, folder: Path) -> int:
    """Run the cases and print those that fail; return their number."""
    material = make_material(folder / "material")
    found: Counter[str] = Counter()
    failed = 0
    started = time.monotonic()
    numbers = range(options.cases) if options.only is None else [options.only]
    for number in numbers:
        kind = options.kinds[number % len(options.kinds)]
        place = folder / "a" / "b" / str(number)
        place.mkdir(parents=True)
        os.chdir(place)  # files written to relative paths, even ../.., stay below `folder`
        case = KINDS[kind](random.Random(f"{options.seed}/{number}"), place, material)
        ending = end_of(case, options.seconds)
        found["success" if ending.status == 0 else f"status {ending.status}"] += 1
        if wrong := complaint(ending):
            failed += 1
            own = [word for word in case.words if word not in SMALL_RUN]
            print(f"case {number}, {kind}: {wrong}\n  {case.command} {own}", flush=True)
            print(
                _indented(ending.stdout[-1500:] + ending.stderr[-1500:] + ending.escaped[-3000:]), flush=True
            )
        elif options.only is not None:
            print(f"{case.command} {case.words}\n{ending.stdout}{ending.stderr}")
        os.chdir(folder)
        shutil.rmtree(place, ignore_errors=True)
    count = len(numbers)
    counts = ", ".join(f"{n} {name}" for name, n in found.most_common())
    seconds = time.monotonic() - started
    print(f"{count} cases in {seconds:.0f} s: {counts}; {failed} failed")
    return failed


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def main(argv: list[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    options = parse_tool_cli(Options, argv, doc=__doc__ or "")
    for name in ("cases", "seconds"):
        if getattr(options, name) < 1:
            refuse(name, getattr(options, name), "is too small", "use 1 or more")
    for kind in options.kinds:
        if kind not in KINDS:
            refuse("kinds", kind, "is unknown", f"use {', '.join(KINDS)}")
    hush_libraries()
    before, words = Path.cwd(), sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="tide-fuzz-") as folder:
        try:
            return int(check(options, Path(folder)) > 0)
        finally:
            os.chdir(before)
            sys.argv[1:] = words


if __name__ == "__main__":
    tool_entry(main)
