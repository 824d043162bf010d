"""What can stop an evaluation."""

from tide_mega.config.errors import StatedError


class EvaluationError(StatedError, RuntimeError):
    """An evaluation that cannot go on; the message says why and on which rank."""


class BrokenReplicaError(EvaluationError):
    """A process failed while others of its replica may wait for it: it must end, and with it the job."""
