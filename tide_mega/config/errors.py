"""The error a user's configuration can cause."""

from typing import Any, NoReturn


class ConfigError(ValueError):
    """A configuration that cannot run.

    The message is one sentence that names the key, the value it has, and a value that would do.
    """


def refuse(key: str, value: Any, why: str, remedy: str) -> NoReturn:
    """Raise ConfigError with the sentence `key=value why: remedy.`"""
    shown = "null" if value is None else value
    raise ConfigError(f"{key}={shown} {why}: {remedy}.")
