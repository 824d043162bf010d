"""Reading stored JSON and YAML, which others may have written: plain values of sensible depth, refused otherwise.

Run folders, datasets and checkpoints pass from user to user. Reading one must not look anything up in the reader's
environment, nor take minutes or end in a RecursionError because of how values are nested or repeated.
"""

import json
from pathlib import Path
from typing import Any

import yaml

from tide_mega.config.paths import regular_file

DEEPEST = 32
"""Levels of nesting; a configuration has three, and no file of ours has ten."""
_LONGEST_YAML = 256 * 1024


def parse_json(text: str | bytes) -> Any:
    """Read JSON.

    Raises:
        ValueError: it is not JSON, or nested more than `DEEPEST` levels deep.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep") from None
    brackets = ("[", "{") if isinstance(text, str) else (b"[", b"{")
    # Fewer brackets than levels, as in any line of metrics.jsonl, need no look at the values.
    if sum(map(text.count, brackets)) > DEEPEST and _depth_exceeds(value, DEEPEST):  # type: ignore[arg-type]
        raise ValueError(f"it is nested more than {DEEPEST} levels deep")
    return value


def read_json(folder: Path, name: str) -> Any:
    """Read a JSON file of a folder that may be others' work.

    Raises:
        ValueError: what has the name is no regular file, or its content is none that `parse_json` reads.
        OSError: it cannot be read, or is not there (FileNotFoundError).
    """
    return parse_json(regular_file(folder, name).read_text(encoding="utf-8"))


def _depth_exceeds(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most + 1):
        level = [outer for outer in level if isinstance(outer, dict | list)]
        if not level:
            return False
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
    return True


def check_yaml(text: str) -> None:
    """Refuse YAML whose depth or size in memory is out of proportion, before anything is built of it.

    Raises:
        ValueError: it is not the YAML of a mapping, is longer than 256 KiB, nested more than `DEEPEST` levels
            deep, or has an alias.
    """
    if len(text) > _LONGEST_YAML:
        raise ValueError(f"it is longer than {_LONGEST_YAML // 1024} KiB")
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            line = event.start_mark.line + 1
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"line {line} has the alias *{event.anchor}, and stored values are plain")
            if depth == 0 and isinstance(event, yaml.ScalarEvent | yaml.SequenceStartEvent):
                raise ValueError("it is not a mapping of keys to values")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ValueError(f"line {line} is nested more than {DEEPEST} levels deep")
    except yaml.YAMLError as error:
        raise ValueError(f"it is not YAML: {getattr(error, 'problem', None) or error}") from error
