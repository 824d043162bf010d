"""Every place metrics go, as one."""

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Protocol

from tide_mega.config.describe import keyed
from tide_mega.config.schema import TideConfig
from tide_mega.metrics.jsonl import JsonlLogger
from tide_mega.metrics.live_records import LiveRecord, WeightsRecord
from tide_mega.metrics.records import EvalRecord, EventRecord, TrainRecord
from tide_mega.training.outset import ORIGIN, SCHEDULE, Outset
from tide_mega.training.progress import Progress
from tide_mega.training.runfolder import RunFolder
from tide_mega.training.wandb_logger import WandbLogger


class MetricsLogger(Protocol):
    """A place metrics go."""

    def log_train(self, record: TrainRecord) -> None:
        """Take the record of a window of training steps."""

    def log_eval(self, record: EvalRecord) -> None:
        """Take the record of an evaluation."""

    def log_live(self, record: LiveRecord) -> None:
        """Take what the tokens of a window of training steps say."""

    def log_weights(self, record: WeightsRecord) -> None:
        """Take what the weights look like at an evaluation."""

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

    def log_live(self, record: LiveRecord) -> None:
        """Log what the tokens of a window of training steps say."""
        for logger in self._loggers:
            logger.log_live(record)

    def log_weights(self, record: WeightsRecord) -> None:
        """Log what the weights look like at an evaluation."""
        for logger in self._loggers:
            logger.log_weights(record)

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


def open_loggers(
    config: TideConfig, folder: RunFolder, outset: Outset, *, total_steps: int, evaluates_again: bool
) -> Loggers:
    """Open metrics.jsonl, the console and W&B where the run stands; keeps W&B's identity in folder and state.

    `evaluates_again`: the run begins with the evaluation of the step it stands at.
    """
    state = outset.state
    known = (folder.read_wandb_id() if config.checkpoint.resume else None) or state.wandb_run_id
    wandb_logger = WandbLogger(
        config.logging,
        folder.path,
        name=config.run.name,
        run_config=keyed(config) | {SCHEDULE: outset.schedule.to_json(), ORIGIN: state.extra.get(ORIGIN)},
        run_id=known,
    )
    state.wandb_run_id = wandb_logger.run_id
    folder.write_wandb_id(wandb_logger.run_id)
    resumed = state.step if outset.is_resumed else None
    jsonl = JsonlLogger(folder.metrics, resumed, state.consumed_tokens, evaluates_again=evaluates_again)
    return Loggers([jsonl, Progress(total_steps), wandb_logger])
