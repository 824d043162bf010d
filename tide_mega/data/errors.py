"""The error that data on disk can cause."""


class DataError(ValueError):
    """Input text or a prepared dataset that cannot be used.

    The message says what was wrong, where, and what to do about it.
    """
