"""Records of steps and evaluations while a run trains, and its summary at the end.

`LossWindow` sums the losses of the steps applied since the last log line, in total and by decile; `Reporter`
builds and logs the records; `RunSummary` becomes summary.json of the run folder and the last lines of the log.

Dimensions: B sequences, T tokens, V vocabulary, S slots, K memory tables.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from tide_mega.checkpoint import TrainingState
from tide_mega.config.schema import TideConfig
from tide_mega.config.sizes import flops_per_token
from tide_mega.data.loader import TokenBatch
from tide_mega.files import write_json
from tide_mega.metrics.deciles import DecileResult, ExactDecileLoss
from tide_mega.metrics.records import EvalRecord, EventRecord, LiveRecord, TrainRecord
from tide_mega.model.stage import TideStage
from tide_mega.model.steps import StepResult
from tide_mega.parallel.device import Device
from tide_mega.parallel.engine import Engine
from tide_mega.parallel.groups import ParallelGroups, sum_over
from tide_mega.run.folder import RunFolder
from tide_mega.training.batches import LeftOut
from tide_mega.training.evaluation import Evaluator
from tide_mega.training.faults.guard import StepGuard
from tide_mega.training.faults.policy import FaultState, Verdict
from tide_mega.training.goodput import PRODUCTIVE, Ledger
from tide_mega.training.live import StepNullWeights, WeightDiagnostics, table_square_norms
from tide_mega.training.loggers import Loggers, format_count, format_duration
from tide_mega.training.setup import device_peak
from tide_mega.training.throughput import Throughput

log = logging.getLogger(__name__)


BY_DECILE = "loss_by_decile"
"""Key under which checkpoints keep the sums by decile."""


@dataclass(frozen=True)
class WindowMeans:
    """Means over the tokens of the window's applied steps on all ranks; NaN if there were none."""

    loss: float
    z_loss: float
    deciles: DecileResult | None
    """None without diagnostics."""


class LossWindow:
    """Sums of the losses since the last log line, on this rank's device; only `means` and `keep` wait for them."""

    def __init__(
        self, z_loss: float, groups: ParallelGroups, bins_V: Tensor, *, by_decile: bool, restores: bool
    ) -> None:
        """Begin an empty window.

        Args:
            z_loss: weight of the z-loss.
            groups: the sums are reduced over its data and pipeline groups.
            bins_V: decile of each type, on the device.
            by_decile: whether to sum by decile too.
            restores: whether this rank restores the sums that a checkpoint holds: exactly one rank of the world
                does.
        """
        self._z_loss, self._groups, self._restores = z_loss, groups, restores
        # [cross entropy, weighted z-loss, tokens]
        self._sums = torch.zeros(3, dtype=torch.float64, device=bins_V.device)
        self._deciles = ExactDecileLoss(bins_V) if by_decile else None
        self.first_step = 1
        """First step included in the sums by decile."""

    def add(self, result: StepResult, batches: list[TokenBatch]) -> None:
        """Add an applied step and its micro-batches."""
        z_loss = self._z_loss * result.z_square_sum
        self._sums += torch.stack([result.loss_sum.double(), z_loss.double(), result.tokens.double()])
        if self._deciles is not None and result.cross_entropies:  # only the last pipeline stage has them
            for loss_BT, batch in zip(result.cross_entropies, batches, strict=True):
                self._deciles.update(loss_BT, batch.labels_BT)

    def means(self) -> WindowMeans:
        """Average over the tokens of all ranks; collective."""
        loss_sum, z_loss_sum, tokens = self._over_ranks(self._sums.clone()).tolist()
        return WindowMeans(
            loss=loss_sum / tokens if tokens else math.nan,
            z_loss=z_loss_sum / tokens if tokens else math.nan,
            deciles=None if self._deciles is None else self._deciles.reduce(self._over_ranks),
        )

    def restart(self, step: int) -> None:
        """Begin a new window after `step` steps."""
        self._sums.zero_()
        self.first_step = step + 1
        if self._deciles is not None:
            self._deciles.reset()

    def keep(self, state: TrainingState) -> None:
        """Store the sums over all ranks in the training state, to be saved with it; collective."""
        state.loss_sum, state.z_loss_sum, tokens = self._over_ranks(self._sums.clone()).tolist()
        state.window_tokens = int(tokens)
        state.extra.pop(BY_DECILE, None)
        if self._deciles is not None:
            sum_S, count_S = self._deciles.reduced(self._over_ranks)
            kept = {"first_step": self.first_step, "sum": sum_S.tolist(), "count": count_S.tolist()}
            state.extra[BY_DECILE] = kept

    def restore(self, state: TrainingState) -> None:
        """Restore the sums from a checkpoint's state; one saved without diagnostics has none by decile."""
        self.restart(state.step)
        if self._restores:
            values = [state.loss_sum, state.z_loss_sum, state.window_tokens]
            self._sums += self._sums.new_tensor(values)
        if self._deciles is not None and (kept := state.extra.get(BY_DECILE)) is not None:
            self.first_step = kept["first_step"]
            if self._restores:
                self._deciles.sum += self._deciles.sum.new_tensor(kept["sum"])
                self._deciles.count += self._deciles.count.new_tensor(kept["count"])

    def _over_ranks(self, tensor: Tensor) -> Tensor:
        return sum_over(self._groups.pipeline, sum_over(self._groups.data, tensor))


@dataclass(frozen=True)
class RunSummary:
    """The state of a run at the end of one of its starts: the content of summary.json."""

    is_complete: bool
    """Whether all steps are done."""
    ended_by: str | None
    """The error that ended the process, or None."""
    steps: int
    total_steps: int
    tokens: int
    """Training tokens consumed, those of skipped steps included."""
    loss: float | None
    """Training loss at the last log line, in nats per token; None if this process logged none."""
    held_out_loss: float | None
    """Held-out loss at the last evaluation, in nats per token."""
    wall_seconds: float
    """Wall time since the first start, including restarts and the time between them."""
    goodput: float
    """Productive time over wall time, 0 to 1."""
    seconds: dict[str, float]
    """Wall time by category (`tide_mega.training.goodput`)."""
    restarts: int
    skipped_steps: int
    spikes: int
    rollbacks: int
    skipped_windows: int
    """Unreadable windows of the training data that were replaced by others."""
    skipped_shards: int
    """Number of shards that these windows belong to."""


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
    """Build the summary of a run at the end of a process."""
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
    """Write the summary to `path` and log it; a write that fails is logged and not raised."""
    try:
        write_json(path, asdict(summary))
    except OSError as error:
        log.warning("%s could not be written: %s", path, error)
    for line in lines(summary):
        log.info(line)


def lines(summary: RunSummary) -> list[str]:
    """Return the last lines of the log."""
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


class Reporter:
    """Measures and logs a run; every method is collective over the world unless marked local."""

    def __init__(
        self,
        config: TideConfig,
        *,
        engine: Engine,
        device: Device,
        bins_V: Tensor,
        evaluator: Evaluator,
        guard: StepGuard,
        left_out: LeftOut,
        ledger: Ledger,
        state: TrainingState,
        total_steps: int,
        loggers: Loggers,
    ) -> None:
        """Continue the measurements kept in `state`; `bins_V` is the decile of every type, on the device."""
        self._total_steps = total_steps
        self._config, self._engine, self._device = config, engine, device
        self._evaluator, self._guard, self._ledger = evaluator, guard, ledger
        self._state, self.loggers, self._left_out = state, loggers, left_out
        self._stage: TideStage = engine.module
        self._is_first = dist.get_rank() == 0
        with_diagnostics = config.logging.diagnostics
        self.window = LossWindow(
            config.trainer.z_loss,
            self._stage.groups,
            bins_V,
            by_decile=with_diagnostics,
            restores=self._is_first,
        )
        self.window.restore(state)
        self._null_weights = StepNullWeights(self._stage, bins_V)
        self._table_squares_K: Tensor | None = None
        self._weights = WeightDiagnostics(engine, bins_V, config.trainer.seed) if with_diagnostics else None
        self._throughput = Throughput(
            flops_per_token=flops_per_token(config.model, config.memory, config.data.seq_length),
            devices=dist.get_world_size(),
            peak_tflops=device_peak(config, device, is_quiet=not self._is_first),
            total_steps=total_steps,
            clock=ledger.training_seconds,
        )
        self._metered_from = state.step
        self._traffic: dict[str, dict[str, int]] = {}
        self._last_train: TrainRecord | None = None
        self._last_eval: EvalRecord | None = None

    @property
    def tokens(self) -> int:
        """Training tokens consumed so far, over all ranks."""
        return self._state.consumed_tokens

    def start(self) -> None:
        """Start measuring speed from the current state; local."""
        self._throughput.start(self._state.step, self.tokens)
        self._metered_from = self._state.step

    def before_step(self, *, logged: bool) -> None:
        """Set whether the step that begins now will be logged; local."""
        self._null_weights.record(logged)

    def look_at_gradients(self) -> None:
        """Measure gradient norms by table; call between a logged step's gradients and its update."""
        if self._stage.num_blocks:
            self._table_squares_K = table_square_norms(self._engine, self._device.torch_device)

    def look_at_traffic(self) -> None:
        """Read the traffic meter; call after a logged step, before rows are read ahead for the next; local."""
        self._traffic = self._stage.meter.read()

    def add(self, result: StepResult, batches: list[TokenBatch]) -> None:
        """Add the losses of an applied step; local, and does not wait for the device."""
        self.window.add(result, batches)

    def log_step(self, lr: float, batches: list[TokenBatch]) -> None:
        """Log the steps since the last line; call after `look_at_traffic`.

        Args:
            lr: learning rate of the last of these steps.
            batches: this replica's micro-batches of that step.
        """
        state, counts = self._state, self._guard.policy.counts
        means, null_weight = self.window.means(), self._null_weights.read(batches)
        slow = self._guard.stragglers()
        reading = self._throughput.read(state.step, self.tokens)
        table_norms = self._table_norms()
        self._left_out.gather()
        memory, peak = self._memory() if self._config.logging.diagnostics else (None, None)
        moved = sum(both["sent"] + both["received"] for both in self._traffic.values())
        self._last_train = TrainRecord(
            step=state.step,
            tokens=self.tokens,
            loss=means.loss,
            z_loss=means.z_loss,
            grad_norm=self._engine.grad_norm(),
            grad_norm_tables=_length(table_norms) if table_norms else None,
            lr=lr,
            null_weight_by_layer=null_weight.by_layer,
            traffic=self._traffic,
            goodput=self._ledger.goodput(),
            skipped_steps=counts.skipped_steps,
            spikes=counts.spikes,
            rollbacks=counts.rollbacks,
            skipped_windows=self._left_out.windows,
            skipped_shards=self._left_out.shards,
            slowest_ratio=slow.slowest_ratio,
            slow_ranks=[rank for replica in slow.slow for rank in replica.ranks],
            memory_bytes=memory,
            peak_memory_bytes=peak,
            exchanged_bytes_per_step=moved / (state.step - self._metered_from),
            **asdict(reading),
        )
        self.loggers.log(self._last_train)
        if means.deciles is not None:
            live = LiveRecord.of(
                state.step,
                self.tokens,
                first_step=self.window.first_step,
                deciles=means.deciles,
                null_weight=null_weight,
                grad_norm_by_table=table_norms,
            )
            self.loggers.log(live)
        self.window.restart(state.step)
        self._metered_from = state.step
        self._ledger.write()

    def log_event(self, event: str, verdict: Verdict, at_step: int) -> None:
        """Log a faulty step, numbered from 1; local."""
        self.loggers.log(
            EventRecord(
                step=self._state.step,
                tokens=self.tokens,
                event=event,
                reason=verdict.reason or "",
                at_step=at_step,
                loss=verdict.loss,
                z_score=verdict.z_score,
            )
        )

    def evaluate(self, on_progress: Callable[[], None]) -> None:
        """Evaluate on held-out text, measure the weights, and log both; `on_progress` is called on progress."""
        step = self._state.step
        with self._ledger.spend("evaluation"), self._stage.meter.paused():  # traffic counts training alone
            self._last_eval = self._evaluator.evaluate(step, self.tokens, on_progress=on_progress)
            self.loggers.log(self._last_eval)
            if self._weights is not None and (found := self._weights.measure(step, self.tokens)) is not None:
                self.loggers.log(found)

    def keep(self) -> None:
        """Store the sums since the last log line and the windows left out in the state, to be saved with it."""
        self.window.keep(self._state)
        self._left_out.keep()

    def rewind(self) -> None:
        """Continue from the restored state after a rollback; local."""
        self.loggers.rewind(self._state.step)
        self._stage.meter.read()
        self.start()
        self.window.restore(self._state)

    def summarise(self, folder: RunFolder, error: BaseException | None) -> None:
        """Write the run's summary and log it; called on the logging rank; local."""
        summary = summarise(
            self._ledger,
            self._guard.policy.counts,
            skipped_windows=self._left_out.windows,
            skipped_shards=self._left_out.shards,
            steps=self._state.step,
            total_steps=self._total_steps,
            tokens=self.tokens,
            last_train=self._last_train,
            last_eval=self._last_eval,
            error=error,
        )
        publish(summary, folder.summary)

    def _table_norms(self) -> list[float]:
        """Return the L2 norm of each table's gradient [K]; infinite if it is not finite."""
        if self._table_squares_K is None:
            return []
        norms = self._table_squares_K.sqrt().tolist()
        return [norm if math.isfinite(norm) else math.inf for norm in norms]

    def _memory(self) -> tuple[int, int]:
        """Return current and peak memory in bytes, each the maximum over all processes."""
        device = self._device
        both = torch.tensor([device.memory_bytes(), device.peak_memory_bytes()], device=device.torch_device)
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        now, peak = both.tolist()
        return now, peak


def _length(parts: list[float]) -> float:
    return math.sqrt(math.fsum(part * part for part in parts))
