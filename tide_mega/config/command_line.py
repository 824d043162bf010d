"""The words of a command line: which are flags, which set a key, and what a key of type str takes.

Such a key takes the word as typed: `2024_10_01`, `1e-4`, `007`, `true`, `a: b` and `a=b` are no numbers, truth
values or mappings there. Quotes around a whole value are taken off, commas part several values, and `null` without
quotes is none.
"""

import re
from collections.abc import Callable, Collection, Mapping

from tide_mega.config.errors import ConfigError

_COMMANDS = ("--multirun", "--run", "--cfg", "--info", "--shell-completion")
_FLAGS: dict[str, tuple[str, ...] | None] = {
    **dict.fromkeys(("--help", "--hydra-help", "--version", "--resolve"), ()),
    **dict.fromkeys(("--multirun", "--run", "--shell-completion"), ()),
    **dict.fromkeys(("--package", "--config-path", "--config-name", "--config-dir"), None),
    "--cfg": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}
"""Hydra's flags and the values each takes: none, any (None), or one of these."""
_COMPLETION = ("install=", "uninstall=", "query=")
_SHORT = {
    **{"-h": "--help", "-c": "--cfg", "-p": "--package", "-r": "--run", "-m": "--multirun"},
    **{"-sc": "--shell-completion", "-cp": "--config-path", "-cn": "--config-name"},
    **{"-cd": "--config-dir", "-i": "--info"},
}
_TOP_LEVEL = re.compile(
    r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|\$\{[^}]*\}|\[[^\]]*\]|\{[^}]*\}|\([^()]*\)|\\.|.""", re.DOTALL
)
_CHOICE = re.compile(r"choice\((.*)\)", re.DOTALL)


def sort_words(words: list[str]) -> list[str]:
    """Return overrides first and flags, spelled out, after them; argparse reads no flags between overrides.

    Raises:
        ConfigError: an unknown flag, one without its value, or two that exclude each other.
    """
    overrides: list[str] = []
    flags: dict[str, list[str]] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word == "-":
            overrides.append(word)
            continue
        name, equals, value = word.partition("=")
        flag = _flag(name)
        takes = _FLAGS[flag]
        if not equals and takes != () and rest and _can_be(rest[0], takes):
            equals, value = "=", rest.pop(0)
        if takes == () and equals:
            raise ConfigError(f"{word} cannot be read: {flag} takes no value.")
        if takes and equals and value not in takes:
            raise ConfigError(f"{flag} {value} does not exist: use {', '.join(takes)}.")
        if takes != () and not equals and flag != "--info":
            raise ConfigError(f"{flag} has no value: give {flag} <{'|'.join(takes or ('value',))}>.")
        flags[flag] = [flag, value] if equals else [flag]
    commands = [flag for flag in _COMMANDS if flag in flags]
    if len(commands) > 1:
        raise ConfigError(f"{' and '.join(commands)} exclude each other: give one of them.")
    if "--shell-completion" in flags and not any(word.startswith(_COMPLETION) for word in overrides):
        raise ConfigError(
            f"--shell-completion has no command: give one of {', '.join(_COMPLETION)}bash, say."
        )
    if "--resolve" in flags and not {"--cfg", "--help"} & flags.keys():
        raise ConfigError("--resolve says how --cfg prints: give --cfg job too.")
    return [*overrides, *(word for given in flags.values() for word in given)]


def _flag(name: str) -> str:
    if name in _SHORT:
        return _SHORT[name]
    meant = [flag for flag in _FLAGS if name == flag or (len(name) > 2 and flag.startswith(name))]
    if name in meant:
        return name
    if len(meant) == 1:
        return meant[0]
    raise ConfigError(f"{name} is no flag: the flags are {', '.join(_FLAGS)}.")


def _can_be(word: str, takes: tuple[str, ...] | None) -> bool:
    return not word.startswith("-") and (takes is None or "=" not in word)


def split_at_commas(text: str) -> list[str]:
    """Part `text` at the commas outside quotes, brackets, parentheses and references."""
    parts = [""]
    for match in _TOP_LEVEL.finditer(text):
        if match.group() == ",":
            parts.append("")
        else:
            parts[-1] += match.group()
    return parts


def single_keys(words: list[str], sections: Collection[str]) -> list[str]:
    """Write `section={key: value, ...}` as a word for each key, so that each is read by its own type."""
    single: list[str] = []
    for word in words:
        section, _, value = word.partition("=")
        pairs = [part.partition(":") for part in split_at_commas(value[1:-1])]
        if (
            section in sections
            and value[:1] == "{"
            and value[-1:] == "}"
            and all(colon for _, colon, _ in pairs)
        ):
            single += single_keys([f"{section}.{k.strip()}={v.strip()}" for k, _, v in pairs], sections)
        else:
            single.append(word)
    return single


def quote_texts(
    word: str, types: Mapping[str, str], reads_as_typed: Callable[[str], bool], quote: Callable[[str], str]
) -> str:
    """Put quotes around those values of an override that Hydra would read as something else than they are.

    Args:
        word: `key=value`, of a key whose type is `str` or `list[str]`; any other word stays as it is.
        types: the type of each key, as the schema writes it.
        reads_as_typed: whether Hydra takes a value for the text that it is, or as several values.
        quote: writes a text in Hydra's quotes.
    """
    key, equals, value = word.partition("=")
    type_name = types.get(key.lstrip("+"), "").removesuffix(" | None")
    if not equals or type_name not in ("str", "list[str]"):
        return word

    def texts(several: str) -> str:
        return ",".join(one(part) for part in split_at_commas(several))

    def one(part: str) -> str:
        text = part if part == value else part.strip()
        if text.strip().lower() in ("", "null") or _unquoted(text) is not None or "\\" in text:
            return part
        if text[0] == "[" and text[-1] == "]" and type_name == "list[str]":
            return f"[{texts(text[1:-1])}]"
        if text[0] in "[{":
            return part
        if choice := _CHOICE.fullmatch(text):
            return texts(choice[1])  # the same sweep; Hydra takes quotes off a function's arguments
        return part if reads_as_typed(text) else quote(text)

    return f"{key}={texts(value)}"


def read_text(value: str) -> str | None:
    """Read the value of a tool's key of type str."""
    if value == "null":
        return None
    unquoted = _unquoted(value)
    return value if unquoted is None else unquoted


def read_texts(word: str) -> list[str | None] | None:
    """Read the value of `key=value` of a tool's key of type list[str], with or without brackets.

    Raises:
        ConfigError: a bracket is not closed, or a value between commas is missing.
    """
    key, _, value = word.partition("=")
    if value == "null":
        return None
    if value.startswith("[") and not value.endswith("]"):
        raise ConfigError(f"{word} cannot be read: the bracket is not closed; quote a value that begins so.")
    inside = value[1:-1] if value.startswith("[") else value
    parts = [part.strip() for part in split_at_commas(inside)]
    if parts[-1] == "":
        parts.pop()
    if "" in parts:
        raise ConfigError(f"{word} cannot be read: there is nothing between two commas; give {key}=[a,b].")
    return [read_text(part) for part in parts]


def _unquoted(value: str) -> str | None:
    """Return what stands between quotes around all of `value`; None where there are none."""
    first = _TOP_LEVEL.match(value)
    if len(value) < 2 or value[0] not in "'\"" or first is None or first.group() != value:
        return None
    return value[1:-1].replace(f"\\{value[0]}", value[0])
