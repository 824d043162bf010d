"""The error of saving and loading."""

from tide_mega.config.errors import StatedError
from tide_mega.config.exits import Exit


class CheckpointError(StatedError, RuntimeError):
    """A checkpoint could not be written, or none can be trusted; the same on every rank."""

    exit_status = Exit.CHECKPOINT
