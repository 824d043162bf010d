"""Turns the several lines in which Hydra reports a user's mistake into one sentence."""

import difflib
import re
from collections.abc import Iterable

from tide_mega.config.help import FieldHelp
from tide_mega.errors import ConfigError


def unknown_key(key: str, entries: list[FieldHelp]) -> str:
    """Return a message that `key` does not exist, with the closest keys of the schema."""
    keys = [entry.key for entry in entries]
    parent = key.rpartition(".")[0]
    siblings = [k for k in keys if parent and k.startswith(f"{parent}.")]
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
    if near:
        remedy = f"did you mean {near[0]}?"
    elif siblings:
        remedy = f"{parent} has {', '.join(k.removeprefix(f'{parent}.') for k in siblings)}"
    else:
        remedy = f"known keys are {', '.join(dict.fromkeys(k.split('.')[0] for k in keys))}"
    return f"Unknown key {key}: {remedy}{'' if remedy.endswith('?') else '.'}"


def explain(error: BaseException, entries: list[FieldHelp]) -> str:
    """Return one sentence for an error in composing, merging or converting a configuration."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    keyed = next((e for e in reversed(chain) if isinstance(getattr(e, "full_key", None), str)), None)
    key = re.sub(r"\[\d+\]$", "", getattr(keyed, "full_key", ""))  # report the list instead of its element
    if keyed is None or not key:
        return _explain_unkeyed(str(error), getattr(error, "override", None))
    first_line = str(keyed).splitlines()[0].strip()
    by_key = {entry.key: entry for entry in entries}
    if first_line.startswith("Key ") and "not in" in first_line:
        return unknown_key(key, entries)
    if "missing mandatory value" in first_line.lower():
        return f"{key} is not set: give {key}=<value> or choose a group that sets it."
    if "does not support deletion" in first_line:
        return f"{key} cannot be deleted: give it another value."
    if key not in by_key:
        return f"{key}: {first_line}."
    takes = by_key[key].type_name.replace(" | None", " or null")
    given = re.search(r"Value (.+?) (?:of type|is not)", first_line)
    if first_line.startswith("Invalid value assigned"):
        return f"{key} has the wrong type: it takes {takes}."
    if given or "is not Optional" in first_line or "Incompatible value 'None'" in first_line:
        value = _unquote(given.group(1)) if given else "null"
        return f"{key}={value} has the wrong type: it takes {takes}."
    return f"{key}: {first_line}; it takes {takes}."


def refuse_keys_below(key: str, leaves: Iterable[str]) -> None:
    """Refuse keys such as `optim.lr.x` and `data.perplexity_texts.0`: a leaf of the schema has no subkeys."""
    if leaf := next((leaf for leaf in leaves if key.lstrip("+~").startswith(f"{leaf}.")), None):
        raise ConfigError(f"Unknown key {key}: {leaf} has no keys of its own, give {leaf}=<value>.")


def refuse_nameless_options(words: list[str], groups: dict[str, dict[str, str]]) -> None:
    """Refuse `=value`, `group=null`, `group=` and `group=[...]`, at which Hydra fails with a traceback."""
    for word in words:
        group, equals, value = word.partition("=")
        if not re.search(r"\w", group.partition("@")[0]) and not group.startswith("-"):
            raise ConfigError(f"{word!r} has no key: give group=option or key=value.")
        is_group = group in groups or "/" in group
        if equals and is_group and (value in ("", "null") or value.startswith(("[", "{"))):
            known = _join(list(groups[group])) if group in groups else "one that --info lists"
            raise ConfigError(f"{word} names no option of {group}: use {known}.")


def _explain_unkeyed(text: str, override: str | None) -> str:
    text = text.replace("\\'", "'")
    options = re.search(
        r"Could not find '(.+?)/([^/']+)'\s+Available options in '.+?':\n(.*?)\nConfig", text, re.S
    )
    if options:
        group, name, listed = options.groups()
        return f"{group}={name} does not exist: use {_join(listed.split())}."
    if several := re.match(r"Ambiguous value for argument '(.+)'\n", text):
        return (
            f"{several.group(1)} gives several values: add --multirun to run each, or quote it as one string."
        )
    if override is not None:
        reasons = [
            line for line in text.splitlines() if not re.match(r"Error parsing|See https|[ ^]+$", line)
        ]
        reason = " ".join(reasons).partition(" expecting {")[0].partition(override)[0].strip(" :")
        if reason == "LexerNoViableAltException":
            reason = "it has a character that is out of place"
        return f"{' '.join(override.split())} cannot be read as group=option or key=value: {reason}."
    return " ".join(text.split()).rstrip(".") + "."


def _join(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _unquote(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == "'" else text
