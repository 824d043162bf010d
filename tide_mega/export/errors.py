"""What keeps an export from being made."""

from tide_mega.config.errors import StatedError


class ExportError(StatedError, RuntimeError):
    """An export that could not be written to its end; nothing of it is left."""
