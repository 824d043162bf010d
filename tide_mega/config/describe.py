"""What the schema says of its own fields: used by help texts and error messages."""

import ast
import dataclasses
import functools
import inspect
import textwrap
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple


class FieldHelp(NamedTuple):
    """One leaf of a (nested) dataclass schema."""

    key: str
    """Dotted path from the root, as written on the command line."""
    type_name: str
    default: Any
    doc: str
    """The string under the field, in one line; empty if there is none."""


def describe(schema: type, prefix: str = "") -> list[FieldHelp]:
    """List the leaves of a dataclass, nested dataclasses by dotted key, in order of definition."""
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
    """Return the key of a field: one that is a word of Python, such as `from`, has an underscore after it."""
    return field_name.removesuffix("_")


def keyed(value: Any) -> Any:
    """Return a configuration as nested dictionaries of its keys."""
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
    """Lay the fields out one under another: key, type, default, meaning."""
    lines = []
    for entry in entries:
        default = "required" if entry.default == "???" else f"default {show(entry.default)}"
        lines.append(f"  {entry.key} ({entry.type_name}, {default})")
        if entry.doc:
            lines.extend(textwrap.wrap(entry.doc, 96, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(lines)


def show(value: Any) -> str:
    """A value as the command line takes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(show(item) for item in value)}]"
    return str(value)
