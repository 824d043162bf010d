"""Lists, verifies and compares checkpoints, whatever the topology that saved them.

    python tools/checkpoints.py list path=runs/demo
    python tools/checkpoints.py verify path=runs/demo
    python tools/checkpoints.py verify path=runs/demo/checkpoints/step-00000100
    python tools/checkpoints.py diff path=runs/a/checkpoints/step-00000100 other=runs/b/checkpoints/step-00000100

`path` is a run's folder, its folder of checkpoints, or one checkpoint. `list` looks at names and sizes, and with
`checksums=true` reads everything; `verify` always does. `diff` prints the largest difference of every tensor (fp32
master weights, exp_avg and exp_avg_sq) that is not bitwise equal, and the tensors missing on one side. Files that
a checkpoint's manifest does not list are not damage; `verify` names them.

Exit status: 0 all whole, or equal; 1 something is damaged, or differs; 2 wrong arguments.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import MISSING

from tide_mega.checkpoint.folder import COMPLETE, CheckpointFolder, step_of, verify
from tide_mega.checkpoint.storage import MANIFEST_FILE, Manifest
from tide_mega.checkpoint.weights import shapes, whole_tensor
from tide_mega.config.command_line import tool_entry
from tide_mega.config.hydra_door import parse_tool_cli
from tide_mega.errors import CheckpointError, ConfigError, printable

COMMANDS = ("list", "verify", "diff")


@dataclass
class Options:
    """What to look at."""

    path: str = MISSING
    """A run's folder, its folder of checkpoints, or one checkpoint."""
    other: str | None = None
    """For diff: the second checkpoint; of a folder, the newest."""
    checksums: bool = False
    """For list: read every file and check it."""


def find(path: str) -> list[Path]:
    """Return the checkpoints that a path refers to, oldest first.

    Raises:
        ConfigError: there are none.
    """
    folder = Path(path)
    if COMPLETE.fullmatch(folder.name) and folder.is_dir():
        return [folder]
    for place in (folder / "checkpoints", folder):
        if found := CheckpointFolder(place).complete():
            return found
    raise ConfigError(f"path={path} holds no checkpoint: give a run's folder, or one named step-00000100.")


def describe(path: Path, problems: list[str] | None) -> str:
    """Return a checkpoint's line; `problems` is None if it was not verified."""
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    saved = path / MANIFEST_FILE
    when = time.strftime(
        "%Y-%m-%d %H:%M:%S", time.localtime((saved if saved.exists() else path).stat().st_mtime)
    )
    verdict = "not verified" if problems is None else "; ".join(problems) or "whole"
    return f"{step_of(path):>10,}  {size / 1e6:>12,.1f}  {when}  {verdict}"


def quick_problems(path: Path) -> list[str] | None:
    """Return the problems visible from names and sizes; None if these tell nothing."""
    try:
        return Manifest.read(path).problems_outside(path) or None
    except CheckpointError as error:
        return [str(error)]


def foreign(path: Path) -> list[str]:
    """Return files in a checkpoint's folder that are not part of it; empty if that is not known."""
    try:
        return Manifest.read(path).foreign(path)
    except CheckpointError:
        return []


def list_or_verify(paths: list[Path], *, reads: bool) -> int:
    """Print a table; return 1 if something is damaged."""
    print(f"{'step':>10}  {'MB':>12}  {'saved':<19}  state")
    damaged = 0
    for path in paths:
        problems = verify(path) if reads else quick_problems(path)
        damaged += bool(problems)
        print(printable(describe(path, problems)), flush=True)
        if reads and (names := foreign(path)):
            print(f"{'':>10}  not part of it, and ignored: {printable(', '.join(names))}")
    if damaged:
        print(f"{damaged} of {len(paths)} damaged")
    return 1 if damaged else 0


def diff(one: Path, two: Path) -> int:
    """Print what differs between two checkpoints; return 1 if anything does."""
    for path in (one, two):
        if problems := verify(path):
            print(printable(f"{path} is damaged: {'; '.join(problems)}"), file=sys.stderr)
            return 1
    here, there = shapes(one), shapes(two)
    differing = 0
    for name in sorted(here.keys() | there.keys()):
        if name not in here or name not in there:
            said = f"only in {one if name in here else two}"
        elif here[name] != there[name]:
            said = f"shape {here[name]} and {there[name]}"
        else:
            first, second = (whole_tensor(path, name, here[name]) for path in (one, two))
            count = int((first.view(torch.int32) != second.view(torch.int32)).sum())
            if count == 0:
                continue
            largest = float((first - second).abs().max())
            said = f"largest difference {largest:.3e}, {count:,} of {first.numel():,} differ"
        differing += 1
        print(f"{name:<48}  {said}")
    total = len(here.keys() | there.keys())
    print(f"{total - differing} of {total} tensors are the same to the last bit, {differing} differ")
    return 1 if differing else 0


def main(argv: list[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] not in COMMANDS:
        if words and words[0] in ("--help", "-h"):
            parse_tool_cli(Options, ["--help"], doc=__doc__ or "")
        print(f"give a command: {', '.join(COMMANDS)} (see --help)", file=sys.stderr)
        return 2
    options = parse_tool_cli(Options, words[1:], doc=__doc__ or "")
    try:
        paths = find(options.path)
        if words[0] != "diff":
            return list_or_verify(paths, reads=options.checksums or words[0] == "verify")
        if options.other is None:
            raise ConfigError("other=null is not set: give other=<checkpoint> to compare with.")
        return diff(paths[-1], find(options.other)[-1])
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except (CheckpointError, OSError) as error:  # OSError: a running training may remove old checkpoints
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    tool_entry(main)
