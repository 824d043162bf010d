"""Parses the words of a command line, silences libraries' warnings, and ends commands with the right status.

Words are flags or set a key. A key of type str takes its word as typed: `2024_10_01`, `1e-4`, `007`, `true`, `a:
b` and `a=b` are not numbers, booleans or mappings there. Quotes around a whole value are removed, commas
separate several values, and an unquoted `null` is None.

Before libraries are imported, the warnings that they print of their own accord are suppressed, since the start-up
log says what was found, and torch is told to ask for huge pages.

A tool ends with its status, with an error's message, or silently if nobody reads its output (`--help | head`).
"""

import logging
import os
import re
import select
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn

from tide_mega.errors import ConfigError, Exit, StatedError, of_the_place

_LIBRARIES = ("megatron", "torch", "deepspeed", "apex", "numpy", "webdataset")

_WARNS_BY_LOG = (
    "megatron.core.models.gpt.gpt_model",  # since 0.19 each chunk warns that GPTModel is deprecated
    "torch.utils.cpp_extension",  # on a machine without a GPU a CUDA build warns that it found nvcc
)
"""Modules whose warnings are sent through logging."""

_COMMANDS = ("--multirun", "--run", "--cfg", "--info", "--shell-completion")
_COMPLETION = ("install=", "uninstall=", "query=")


def hush_libraries() -> None:
    """Suppress the libraries' warnings; call before importing them, which is when most appear."""
    for library in _LIBRARIES:
        warnings.filterwarnings("ignore", module=rf"{library}(\.|$)")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    for module in _WARNS_BY_LOG:
        logging.getLogger(module).setLevel(logging.ERROR)


def use_huge_pages() -> None:
    """Make torch request huge pages for large CPU tensors; call before importing torch.

    Sets torch's own switch, which is off by default. Linux complies if
    /sys/kernel/mm/transparent_hugepage/enabled is madvise or always. THP_MEM_ALLOC_ENABLE=0 in the environment
    keeps it off.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


_FLAGS: dict[str, tuple[str, ...] | None] = {
    **dict.fromkeys(("--help", "--hydra-help", "--version", "--resolve"), ()),
    **dict.fromkeys(("--multirun", "--run", "--shell-completion"), ()),
    **dict.fromkeys(("--package", "--config-path", "--config-name", "--config-dir"), None),
    "--cfg": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}
"""Hydra's flags and the values that each takes: none (empty), any (None), or one of those listed."""
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
    """Return the overrides followed by the flags, spelled out; argparse accepts no flags between overrides.

    Raises:
        ConfigError: a flag is unknown or lacks its value, or two flags exclude each other.
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
    """Split `text` at commas outside quotes, brackets, parentheses and references."""
    parts = [""]
    for match in _TOP_LEVEL.finditer(text):
        if match.group() == ",":
            parts.append("")
        else:
            parts[-1] += match.group()
    return parts


def single_keys(words: list[str], sections: Collection[str]) -> list[str]:
    """Expand `section={key: value, ...}` to one word per key, so that each value is read by its key's type."""
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
    """Quote those text values of an override that Hydra would otherwise read as something else.

    Args:
        word: `key=value` of a key of type `str` or `list[str]`; any other word is returned unchanged.
        types: the type of each key, as written in the schema.
        reads_as_typed: returns whether Hydra reads a value as the text that it is, or as several values.
        quote: quotes a text for Hydra.
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
            return texts(choice[1])  # the same sweep; Hydra removes quotes from a function's arguments
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
        ConfigError: a bracket is not closed, or there is nothing between two commas.
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
    """Return the text between quotes that enclose all of `value`; None if there are none."""
    first = _TOP_LEVEL.match(value)
    if len(value) < 2 or value[0] not in "'\"" or first is None or first.group() != value:
        return None
    return value[1:-1].replace(f"\\{value[0]}", value[0])


UNREAD = 128 + 13
"""Exit status of a command whose reader is gone: a shell's status for SIGPIPE, which Python ignores."""


def status_of(work: Callable[[], object], *failures: type[Exception]) -> int:
    """Run a tool's work; return its exit status: 0, 1 after one of `failures`, 2 for a bad option.

    The error's message is printed instead of a traceback.
    """
    try:
        work()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return Exit.CONFIG
    except failures as error:
        print(f"error: {error}", file=sys.stderr)
        return Exit.ERROR
    return Exit.DONE


def tool_entry(main: Callable[[], int | None]) -> NoReturn:
    """Run a tool and exit with the status that it returns, silently if nobody reads its output any more.

    A `StatedError` raised by the tool becomes its message on stderr and its class's status; so does an error of
    the file system that is due to the location of a file.
    """
    with quiet_when_unread():
        try:
            status = main()
        except (StatedError, OSError) as error:
            stated = of_the_place(error) if isinstance(error, OSError) else error
            if stated is None:
                raise
            print(stated, file=sys.stderr, flush=True)
            status = stated.exit_status
    sys.exit(status)


@contextmanager
def quiet_when_unread() -> Iterator[None]:
    """End this process with status `UNREAD` when it writes to a standard output that nobody reads.

    Buffered output is flushed before the context ends, since at interpreter exit it would be too late. Any other
    broken pipe stays an error.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        if not _is_unread():
            raise
        # The interpreter flushes once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(UNREAD) from None


def _is_unread() -> bool:
    """Return whether standard output is a pipe without readers."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
    except (OSError, ValueError, AttributeError):  # not an operating-system file
        return False
