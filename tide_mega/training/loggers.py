"""Every place metrics go, as one."""

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Protocol

from tide_mega.metrics.records import EvalRecord, EventRecord, TrainRecord


class MetricsLogger(Protocol):
    """A place metrics go."""

    def log_train(self, record: TrainRecord) -> None:
        """Take the record of a window of training steps."""

    def log_eval(self, record: EvalRecord) -> None:
        """Take the record of an evaluation."""

    def log_event(self, record: EventRecord) -> None:
        """Take the record of a step that was not as it should be."""

    def rewind(self, step: int) -> None:
        """The run goes back to `step` steps done; later steps will come again."""

    def close(self) -> None:
        """Write out what is left."""


class Loggers:
    """Passes each record to every logger, in order; empty on the ranks that do not log."""

    def __init__(self, loggers: Sequence[MetricsLogger] = ()) -> None:
        self._loggers = tuple(loggers)

    def log_train(self, record: TrainRecord) -> None:
        """Log the record of a window of training steps."""
        for logger in self._loggers:
            logger.log_train(record)

    def log_eval(self, record: EvalRecord) -> None:
        """Log the record of an evaluation."""
        for logger in self._loggers:
            logger.log_eval(record)

    def log_event(self, record: EventRecord) -> None:
        """Log a step that was not as it should be."""
        for logger in self._loggers:
            logger.log_event(record)

    def rewind(self, step: int) -> None:
        """Say that the run goes back to `step` steps done."""
        for logger in self._loggers:
            logger.rewind(step)

    def close(self) -> None:
        """Close every logger, the last first, even where one raises."""
        with ExitStack() as stack:
            for logger in self._loggers:
                stack.callback(logger.close)

    def __enter__(self) -> "Loggers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
