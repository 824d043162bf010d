"""The errors that data on disk can cause."""

from tide_mega.config.errors import StatedError
from tide_mega.config.exits import Exit


class DataError(StatedError, ValueError):
    """Input text or a prepared dataset that cannot be used.

    The message says what was wrong, where, and what to do about it.
    """

    exit_status = Exit.DATA


class UnreadableShardError(DataError):
    """A shard of a prepared dataset that cannot be read, at all or at one place."""

    def __init__(self, message: str, shard: str = "") -> None:
        super().__init__(message)
        self.shard = shard
        """Its file name in the dataset."""
