"""How a run went: summary.json of the run folder, and the last lines of the log."""

import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from tide_mega.data.atomic import write_json
from tide_mega.metrics.records import EvalRecord, TrainRecord
from tide_mega.training.faults.policy import FaultState
from tide_mega.training.goodput import PRODUCTIVE, Ledger
from tide_mega.training.progress import format_count, format_duration

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunSummary:
    """A run up to the end of one of its processes."""

    is_complete: bool
    """Whether all steps are done."""
    ended_by: str | None
    """The error that ended the process, or None."""
    steps: int
    total_steps: int
    tokens: int
    """Training tokens consumed, those of skipped steps included."""
    loss: float | None
    """Training loss at the last log line, in nats per token; None where this process logged none."""
    held_out_loss: float | None
    """At the last evaluation."""
    wall_seconds: float
    """Since the first start, restarts and the time between them included."""
    goodput: float
    """Productive over wall time, 0 to 1."""
    seconds: dict[str, float]
    """Wall time by category (`tide_mega.training.goodput`)."""
    restarts: int
    skipped_steps: int
    spikes: int
    rollbacks: int
    skipped_windows: int
    """Windows of the training data whose place others took, since they could not be read."""
    skipped_shards: int
    """Shards that these are of."""


def summarise(
    ledger: Ledger,
    counts: FaultState,
    *,
    skipped_windows: int,
    skipped_shards: int,
    steps: int,
    total_steps: int,
    tokens: int,
    last_train: TrainRecord | None,
    last_eval: EvalRecord | None,
    error: BaseException | None,
) -> RunSummary:
    """Put together what is known at the end of a process."""
    return RunSummary(
        is_complete=steps >= total_steps,
        ended_by=None if error is None else f"{type(error).__name__}: {error}",
        steps=steps,
        total_steps=total_steps,
        tokens=tokens,
        loss=None if last_train is None or math.isnan(last_train.loss) else last_train.loss,
        held_out_loss=None if last_eval is None else last_eval.loss,
        wall_seconds=ledger.wall(),
        goodput=ledger.goodput(),
        seconds=ledger.seconds(),
        restarts=ledger.starts - 1,
        skipped_steps=counts.skipped_steps,
        spikes=counts.spikes,
        rollbacks=counts.rollbacks,
        skipped_windows=skipped_windows,
        skipped_shards=skipped_shards,
    )


def publish(summary: RunSummary, path: Path) -> None:
    """Write the summary to `path`, and its lines to the log."""
    try:
        write_json(path, asdict(summary))
    except OSError as error:
        log.warning("%s could not be written: %s", path, error)
    for line in lines(summary):
        log.info(line)


def lines(summary: RunSummary) -> list[str]:
    """What the log ends with."""
    loss = "" if summary.loss is None else f", loss {summary.loss:.4f}"
    held_out = "" if summary.held_out_loss is None else f", held-out loss {summary.held_out_loss:.4f}"
    end = "complete" if summary.is_complete else "stopped"
    rest = {name: s for name, s in summary.seconds.items() if name != PRODUCTIVE and s > 0}
    shares = [
        f"{name} {seconds / summary.wall_seconds:.1%}"
        for name, seconds in sorted(rest.items(), key=lambda item: -item[1])
        if seconds >= 0.0005 * summary.wall_seconds
    ]
    left_out = (
        f", {summary.skipped_windows:,} unreadable windows of {summary.skipped_shards} shards left out"
        if summary.skipped_shards
        else ""
    )
    return [
        f"{end} at step {summary.steps}/{summary.total_steps}, {format_count(summary.tokens)} tokens"
        f"{loss}{held_out}",
        f"goodput {summary.goodput:.1%} of {format_duration(summary.wall_seconds)}; "
        f"the rest: {', '.join(shares) or '-'}",
        f"{summary.restarts} restarts, {summary.skipped_steps} skipped steps, {summary.spikes} loss spikes, "
        f"{summary.rollbacks} rollbacks{left_out}",
    ]
