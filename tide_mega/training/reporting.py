"""Everything a run says of itself while it trains: records of steps and evaluations, a summary at the end."""

import math
from collections.abc import Callable
from dataclasses import asdict

import torch
import torch.distributed as dist
from torch import Tensor

from tide_mega.checkpoint import TrainingState
from tide_mega.config.schema import TideConfig
from tide_mega.config.sizes import flops_per_token
from tide_mega.data.batch import TokenBatch
from tide_mega.metrics.live_records import LiveRecord
from tide_mega.metrics.records import EvalRecord, EventRecord, TrainRecord
from tide_mega.model.passes import StepResult
from tide_mega.model.stage import TideStage
from tide_mega.parallel.device import Device
from tide_mega.parallel.engine import Engine
from tide_mega.training.evaluation import Evaluator
from tide_mega.training.faults.guard import StepGuard
from tide_mega.training.faults.policy import Verdict
from tide_mega.training.goodput import Ledger
from tide_mega.training.left_out import LeftOut
from tide_mega.training.live.null_weights import StepNullWeights
from tide_mega.training.live.table_gradients import table_square_norms
from tide_mega.training.live.weights import WeightDiagnostics
from tide_mega.training.loggers import Loggers
from tide_mega.training.loss_window import LossWindow
from tide_mega.training.runfolder import RunFolder
from tide_mega.training.setup import device_peak
from tide_mega.training.summary import publish, summarise
from tide_mega.training.throughput import Throughput


class Reporter:
    """Measures and logs; every method is collective over the world unless it says otherwise."""

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
        """Go on from where `state` stands; `bins_V` is the decile of every type, on the device."""
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
            speaks=self._is_first,
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
        """Begin to measure speed, with the state's steps done; local."""
        self._throughput.start(self._state.step, self.tokens)
        self._metered_from = self._state.step

    def before_step(self, *, logged: bool) -> None:
        """Say whether a log line follows the step that begins now; local."""
        self._null_weights.record(logged)

    def look_at_gradients(self) -> None:
        """Between a logged step's gradients and its update."""
        if self._stage.num_blocks:
            self._table_squares_K = table_square_norms(self._engine, self._device.torch_device)

    def look_at_traffic(self) -> None:
        """After a logged step, before anything is read ahead for the next; local."""
        self._traffic = self._stage.meter.read()

    def add(self, result: StepResult, batches: list[TokenBatch]) -> None:
        """Take in the losses of an applied step; local, nothing waits for the device."""
        self.window.add(result, batches)

    def log_step(self, lr: float, batches: list[TokenBatch]) -> None:
        """Log the steps since the last line, after `look_at_traffic`; the last was made with `lr` of `batches`."""
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
        self.loggers.log_train(self._last_train)
        if means.deciles is not None:
            live = LiveRecord.of(
                state.step,
                self.tokens,
                first_step=self.window.first_step,
                deciles=means.deciles,
                null_weight=null_weight,
                grad_norm_by_table=table_norms,
            )
            self.loggers.log_live(live)
        self.window.restart(state.step)
        self._metered_from = state.step
        self._ledger.write()

    def log_event(self, event: str, verdict: Verdict, at_step: int) -> None:
        """Log what a step, from 1, was not as it should be; local."""
        self.loggers.log_event(
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
        """Evaluate on held-out text, look at the weights, and log both; `on_progress` hears of batches."""
        step = self._state.step
        with self._ledger.spend("evaluation"), self._stage.meter.paused():  # traffic is that of training
            self._last_eval = self._evaluator.evaluate(step, self.tokens, on_progress=on_progress)
            self.loggers.log_eval(self._last_eval)
            if self._weights is not None and (found := self._weights.measure(step, self.tokens)) is not None:
                self.loggers.log_weights(found)

    def keep(self) -> None:
        """Put the sums since the last log line, and what was left out, into the state, to be saved with it."""
        self.window.keep(self._state)
        self._left_out.keep()

    def rewind(self) -> None:
        """Go on from where the state now stands, after a rollback; local."""
        self.loggers.rewind(self._state.step)
        self._stage.meter.read()
        self.start()
        self.window.restore(self._state)

    def summarise(self, folder: RunFolder, error: BaseException | None) -> None:
        """Say how the run went, on the rank that logs; local."""
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
        """L2 norm of each table's gradient [K]; infinite where it is not finite."""
        if self._table_squares_K is None:
            return []
        norms = self._table_squares_K.sqrt().tolist()
        return [norm if math.isfinite(norm) else math.inf for norm in norms]

    def _memory(self) -> tuple[int, int]:
        """Bytes in use and at most so far, of the process where they are most."""
        device = self._device
        both = torch.tensor([device.memory_bytes(), device.peak_memory_bytes()], device=device.torch_device)
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        now, peak = both.tolist()
        return now, peak


def _length(parts: list[float]) -> float:
    return math.sqrt(math.fsum(part * part for part in parts))
