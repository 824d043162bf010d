"""What keeps text from being made."""

from tide_mega.config.errors import StatedError
from tide_mega.config.exits import Exit


class FolderError(StatedError, ValueError):
    """An exported folder that cannot be used: a file is missing, damaged or another model's, or not supported."""

    exit_status = Exit.DATA


class GenerationError(StatedError, RuntimeError):
    """Generation that cannot go on: nothing wrong is written in its place."""
