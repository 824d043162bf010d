"""Help from the schema: the docstrings of its fields, for error messages and for what `--help` prints."""

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

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


class FieldHelp(NamedTuple):
    """One leaf of a (nested) dataclass schema."""

    key: str
    """Dotted path from the root, as written on the command line."""
    type_name: str
    default: Any
    doc: str
    """The docstring under the field, in one line; empty if there is none."""


def describe(schema: type, prefix: str = "") -> list[FieldHelp]:
    """Return the leaves of a dataclass, nested dataclasses by dotted key, in order of definition."""
    return list(_describe(schema, prefix))


def _describe(schema: type, prefix: str) -> Iterator[FieldHelp]:
    hints = typing.get_type_hints(schema)
    notes = _annotations_and_docs(schema)
    for field in dataclasses.fields(schema):
        hint = hints[field.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _describe(hint, f"{prefix}{field.name}.")
            continue
        type_name, doc = notes[field.name]
        yield FieldHelp(prefix + key_of(field.name), type_name, _default(field), doc)


def key_of(field_name: str) -> str:
    """Return the key of a field, without the underscore that follows Python keywords such as `from`."""
    return field_name.removesuffix("_")


def keyed(value: Any) -> Any:
    """Return a configuration as nested dictionaries by key."""
    if dataclasses.is_dataclass(value):
        return {key_of(item.name): keyed(getattr(value, item.name)) for item in dataclasses.fields(value)}
    return value


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return "???" if field.default is dataclasses.MISSING else field.default


@functools.cache
def _annotations_and_docs(schema: type) -> dict[str, tuple[str, str]]:
    notes: dict[str, tuple[str, str]] = {}
    for base in reversed(schema.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        definition = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(definition, ast.ClassDef)
        following = [*definition.body[1:], None]
        for statement, after in zip(definition.body, following, strict=True):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            doc = ""
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                doc = " ".join(str(after.value.value).split())
            notes[statement.target.id] = (ast.unparse(statement.annotation), doc)
    return notes


def format_fields(entries: list[FieldHelp]) -> str:
    """Format the fields as a list: key, type, default, meaning."""
    lines = []
    for entry in entries:
        default = "required" if entry.default == "???" else f"default {show(entry.default)}"
        lines.append(f"  {entry.key} ({entry.type_name}, {default})")
        if entry.doc:
            lines.extend(textwrap.wrap(entry.doc, 96, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(lines)


def show(value: Any) -> str:
    """Return a value as it is written on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(show(item) for item in value)}]"
    return str(value)


def group_options(conf: Path) -> dict[str, dict[str, str]]:
    """Return, for each group of `conf`, its options with the first comment line of their files."""
    groups: dict[str, dict[str, str]] = {}
    for path in sorted(conf.glob("*/*.yaml"), key=lambda p: (p.parent.name, _natural(p.stem))):
        lines = path.read_text(encoding="utf-8").splitlines()
        comments = (line[1:].strip() for line in lines if line.startswith("#"))
        meaning = next((text for text in comments if not text.startswith("@package")), "")
        groups.setdefault(path.parent.name, {})[path.stem] = meaning
    return groups


def help_text(groups: dict[str, dict[str, str]], entries: list[FieldHelp]) -> str:
    """Return the help page as a `string.Template`, with `$` escaped, for Hydra's `hydra.help.template`."""
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
