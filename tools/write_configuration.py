"""Write the reference of every configuration key, docs/configuration.md, from the schema and the groups of conf/.

    python tools/write_configuration.py
    python tools/write_configuration.py out=docs/configuration.md

Prints Markdown, or writes it to `out`: the options of each group with the first comment of their files, then every
key with its type, its default in the schema, and what the schema says of it. Run it after a change of
tide_mega/config/schema.py or of a first comment in conf/; a test compares the file with what this would write.
`python -m tide_mega.train --help` shows the same in a terminal.
"""

import dataclasses
import inspect
import re
import textwrap
import typing
from dataclasses import dataclass
from pathlib import Path

from tide_mega.config.command_line import tool_entry
from tide_mega.config.help import FieldHelp, describe, group_options, show
from tide_mega.config.hydra_door import find_conf, parse_tool_cli
from tide_mega.config.schema import TideConfig
from tide_mega.errors import ConfigError
from tide_mega.files import write_bytes

WIDTH = 110
"""Characters of a line."""
HEAD = """\
# Configuration

<!-- Written by tools/write_configuration.py from tide_mega/config/schema.py and conf/: change those. -->

A run is composed by Hydra from the groups below and from `key=value` words, and is checked as a whole before
anything is loaded:

```bash
python -m tide_mega.train --help                                      # this page in a terminal
python -m tide_mega.train experiment=tide_8e_1b --cfg job             # the resolved configuration
python -m tide_mega.train experiment=demo_tide memory=k8 optim.lr=2e-3 run.name=wider
```

A wrong key, a wrong type or an impossible combination is refused in one sentence that names the key, the value and
a value that would do ([troubleshooting.md](troubleshooting.md)). A key of type `str` takes the word as typed:
`run.name=2024_10_01` is not a number. Quote a comma, or the word `null`. Flags may stand anywhere between the
overrides.
"""


@dataclass
class Options:
    """Where the reference goes."""

    out: str | None = None
    """File to write; null prints."""


def reference(conf: Path) -> str:
    """The whole page, as Markdown.

    Args:
        conf: the folder of configuration groups.
    """
    parts = [HEAD, "## Groups\n"]
    for group, options in group_options(conf).items():
        parts.append(f"### `{group}=`\n")
        parts.append("| option | |\n|---|---|")
        parts.extend(f"| `{name}` | {_plain(meaning)} |" for name, meaning in options.items())
        parts.append("")
    parts.append("## Keys\n")
    parts.append(
        "Defaults are the schema's; an option of a group may set another value. A key marked *required* has none\n"
        "and is set by a group or on the command line.\n"
    )
    entries = describe(TideConfig)
    hints = typing.get_type_hints(TideConfig)
    for section in dataclasses.fields(TideConfig):
        schema = hints[section.name]
        inside = [entry for entry in entries if entry.key.partition(".")[0] == section.name]
        parts.append(f"### {section.name}\n")
        if dataclasses.is_dataclass(schema):
            parts.append(f"{_paragraphs(inspect.getdoc(schema) or '')}\n")
        parts.extend(_item(entry) for entry in inside)
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def _item(entry: FieldHelp) -> str:
    default = "*required*" if entry.default == "???" else f"default `{show(entry.default)}`"
    text = f"- `{entry.key}` ({entry.type_name}, {default})"
    return _wrapped(f"{text}: {_plain(entry.doc)}" if entry.doc else text, indent="  ")


def _paragraphs(text: str) -> str:
    return "\n\n".join(_wrapped(_plain(paragraph)) for paragraph in text.split("\n\n"))


def _wrapped(text: str, *, indent: str = "") -> str:
    lines = textwrap.wrap(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Keep Markdown from reading as its own what a docstring writes outside of backticks."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(part if part.startswith("`") else re.sub(r"([<|*])", r"\\\1", part) for part in parts)


def main(argv: list[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    options = parse_tool_cli(Options, argv, doc=__doc__ or "")
    conf = find_conf()
    if conf is None:
        raise ConfigError("No folder conf/ beside the package or in the current folder: start in a checkout.")
    page = reference(conf)
    if options.out is None:
        print(page, end="")
    else:
        write_bytes(Path(options.out), page.encode())
    return 0


if __name__ == "__main__":
    tool_entry(main)
