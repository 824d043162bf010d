"""The error a user's configuration can cause."""


class ConfigError(ValueError):
    """A configuration that cannot run.

    The message is one sentence that names the key, the value it has, and a value that would do.
    """
