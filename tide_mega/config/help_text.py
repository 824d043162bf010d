"""What `--help` prints: groups with their options, examples, and every key with its meaning."""

import re
from pathlib import Path

from tide_mega.config.describe import FieldHelp, format_fields

_HEAD = """\
Train TIDE, or its LLaMA baseline (memory=none), on prepared text.

  python -m tide_mega.train [group=option ...] [key=value ...]

Examples

  python -m tide_mega.train experiment=demo_tide
  torchrun --nproc-per-node=8 -m tide_mega.train experiment=tide_8e_1b cluster=h100 data.path=data/dclm-llama3
  python -m tide_mega.train experiment=tide_8e_1b memory=k16 optim.lr=2e-4 --cfg job
  python -m tide_mega.train --multirun experiment=demo_tide memory=none,k2,k4
  python -m tide_mega.train experiment=demo_tide run.from=runs/demo-k4@275 trainer.max_steps=800 run.name=longer

An experiment chooses options of the groups; options and keys on the command line override it. The run folder
is run.root/run.name: give runs that differ in other keys than the model and K a run.name each.

A key of type str takes the word as typed (run.name=2024_10_01); quote a comma, or the word 'null'. Flags may stand
anywhere. A sweep (--multirun) goes on after a point that fails, names such points with their reasons at its end,
and then exits with status 8; the same command runs them again and finds the others complete.
"""
_TAIL = """
Flags: --cfg job prints the composed configuration and stops (--resolve fills in references),
--info shows where values come from, --multirun runs every combination of comma-separated values,
--config-dir=<folder> adds a folder of your own options, --hydra-help lists the rest.
"""


def group_options(conf: Path) -> dict[str, dict[str, str]]:
    """For each group of `conf`, its options and the first comment line of each one's file."""
    groups: dict[str, dict[str, str]] = {}
    for path in sorted(conf.glob("*/*.yaml"), key=lambda p: (p.parent.name, _natural(p.stem))):
        lines = path.read_text(encoding="utf-8").splitlines()
        comments = (line[1:].strip() for line in lines if line.startswith("#"))
        meaning = next((text for text in comments if not text.startswith("@package")), "")
        groups.setdefault(path.parent.name, {})[path.stem] = meaning
    return groups


def help_text(groups: dict[str, dict[str, str]], entries: list[FieldHelp]) -> str:
    """The help page as a `string.Template`, `$` escaped, for Hydra's `hydra.help.template`."""
    parts = [_HEAD, "Groups and their options\n"]
    for group, options in groups.items():
        width = max(map(len, options))
        parts.append(f"  {group}=")
        parts.extend(f"    {name:<{width}}  {meaning}".rstrip() for name, meaning in options.items())
    parts.append("\nKeys, with the schema's defaults (an option of a group may set another value)\n")
    parts.append(format_fields(entries))
    parts.append(_TAIL)
    return "\n".join(parts).replace("$", "$$")


def _natural(name: str) -> list[tuple[int, str]]:
    # "tide_16e_1b" sorts after "tide_2e_1b".
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]
