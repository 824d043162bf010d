"""What live diagnostics add to training steps: steps with and without them take turns in one process.

With one process no all-reduce is timed: what diagnostics add between ranks is not included.
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from tide_mega.config.schema import LoggingConfig, TideConfig
from tide_mega.data.frequency import DecileTable
from tide_mega.lab.bench.measure import Spread, Stopwatch
from tide_mega.lab.bench.step_case import StepCase
from tide_mega.lab.bench.text import draw_ids
from tide_mega.metrics.jsonl import JsonlLogger
from tide_mega.metrics.records import LiveRecord
from tide_mega.model.steps import compute_gradients
from tide_mega.parallel.device import Device
from tide_mega.training.live import StepNullWeights, WeightDiagnostics, table_square_norms
from tide_mega.training.loggers import Loggers, WandbLogger
from tide_mega.training.report import LossWindow

STEP = ("gradients", "optimizer", "losses")
"""Regions of a step without diagnostics."""
RECORDING = "recording of router weights"
"""Extra time of gradients in a logged step; not a region, since it is spread over the layers."""
EACH_STEP, LOGGED, EVALUATED = (
    ("loss by decile",),
    (
        RECORDING,
        "gradient norm of each table",
        "null weight by layer and decile",
        "memory, means over ranks",
        "writing",
    ),
    ("norms and distances of weights", "writing of these"),
)
"""Regions that diagnostics add to every step, to a logged step, and to an evaluation."""


def deciles_of_zipf(vocab_size: int) -> Tensor:
    """Deciles [V] of ids as the benchmark draws them."""
    ids = draw_ids("zipf", 20 * vocab_size, vocab_size, seed=0)
    counts = torch.bincount(ids, minlength=vocab_size).numpy()
    return torch.from_numpy(DecileTable.from_filter(counts, lambda _: True).bin_of_type)


class LiveCase:
    """One model whose steps are taken with or without diagnostics; a context manager."""

    def __init__(self, config: TideConfig, device: Device, accumulation: int, *, wandb: bool) -> None:
        """Build the model; records go to a temporary folder, removed on exit, and to an offline W&B run."""
        self.case = StepCase(config, device, accumulation)
        bins_V = deciles_of_zipf(config.model.vocab_size).to(device.torch_device)
        stage, z_loss = self.case.stage, config.trainer.z_loss
        self._plain, self._by_decile = (
            LossWindow(z_loss, stage.groups, bins_V, by_decile=by_decile, restores=True)
            for by_decile in (False, True)
        )
        self._null = StepNullWeights(stage, bins_V)
        self._weights = WeightDiagnostics(self.case.engine, bins_V, config.trainer.seed)
        self._folder = TemporaryDirectory()
        folder = Path(self._folder.name)
        mode = LoggingConfig(wandb="offline" if wandb else "disabled")
        self._loggers = Loggers(
            [
                JsonlLogger(folder / "metrics.jsonl", None),
                WandbLogger(mode, folder, name="bench", run_config={}, run_id=None),
            ]
        )
        self._steps = 0

    def without(self, watch: Stopwatch) -> None:
        """Run a step without diagnostics and accumulate its loss; marks `STEP`."""
        self._null.record(False)
        result = compute_gradients(
            self.case.engine, self.case.batches, 0.0, window=self.case.config.memory.window
        )
        watch.mark("gradients")
        self.case.engine.step(self.case.config.optim.lr)
        watch.mark("optimizer")
        self._plain.add(result, self.case.batches)
        watch.mark("losses")

    def with_diagnostics(self, watch: Stopwatch, *, logged: bool) -> None:
        """Run a step with diagnostics; marks `STEP`, `EACH_STEP` and, if it is logged, `LOGGED`."""
        case, device = self.case, self.case.device
        self._null.record(logged)
        result = compute_gradients(case.engine, case.batches, 0.0, window=case.config.memory.window)
        watch.mark("gradients")
        norms = None
        if logged and case.stage.num_blocks:
            norms = table_square_norms(case.engine, device.torch_device)
            watch.mark("gradient norm of each table")
        case.engine.step(case.config.optim.lr)
        watch.mark("optimizer")
        self._plain.add(result, case.batches)
        watch.mark("losses")
        self._by_decile.add(result, case.batches)
        watch.mark("loss by decile")
        self._steps += 1
        if not logged:
            return
        null = self._null.read(case.batches)
        watch.mark("null weight by layer and decile")
        device.memory_bytes(), device.peak_memory_bytes()
        deciles = self._by_decile.means().deciles
        assert deciles is not None
        record = LiveRecord.of(
            self._steps,
            self._steps,
            first_step=self._by_decile.first_step,
            deciles=deciles,
            null_weight=null,
            grad_norm_by_table=[] if norms is None else norms.sqrt().tolist(),
        )
        self._by_decile.restart(self._steps)
        watch.mark("memory, means over ranks")
        self._loggers.log(record)
        watch.mark("writing")

    def evaluation(self, watch: Stopwatch) -> None:
        """Inspect the weights as an evaluation does; marks `EVALUATED`."""
        record = self._weights.measure(self._steps, self._steps)
        watch.mark("norms and distances of weights")
        if record is not None:
            self._loggers.log(record)
        watch.mark("writing of these")

    def close(self) -> None:
        """Free everything."""
        self._loggers.close()
        self._folder.cleanup()
        self.case.close()


@dataclass(frozen=True)
class LiveCost:
    """The measurements, in seconds."""

    step: Spread
    """Without diagnostics."""
    items: dict[str, Spread]
    """By region, per occurrence."""
    ratio: Spread
    """Steps with over steps without diagnostics, per round of `every` steps, one of them logged."""

    def share(self, every: int, eval_every: int) -> float:
        """Return the amortised cost of all items over a step's time, at these logging and evaluation intervals."""
        of = {name: spread.median for name, spread in self.items.items()}
        per_step = sum(of.get(name, 0.0) for name in EACH_STEP)
        per_step += sum(of.get(name, 0.0) for name in LOGGED) / every
        per_step += sum(of.get(name, 0.0) for name in EVALUATED) / eval_every
        return per_step / self.step.median


def recording(logged: list[float], others: list[float]) -> Spread:
    """Return the extra seconds of gradients in logged steps over the median of the others, at least 0."""
    usual = Spread.of(others).median
    found = Spread.of(logged)
    return Spread(*(max(seconds - usual, 0.0) for seconds in (found.median, found.low, found.high)))


def measure(case: LiveCase, *, rounds: int, every: int, warmup: int) -> LiveCost:
    """Run steps without and with diagnostics in turns, `every` of each per round, then an evaluation.

    The machine's drift affects both equally; a round's ratio compares their sums.
    """
    watch = Stopwatch(case.case.device.torch_device)

    def timed(logged: bool | None) -> dict[str, float]:
        watch.start()
        if logged is None:
            case.without(watch)
        else:
            case.with_diagnostics(watch, logged=logged)
        return watch.read()

    for _ in range(warmup):
        timed(None), timed(False), timed(True)
    watch.start()
    case.evaluation(watch)
    watch.read()
    plain: list[float] = []
    ratios: list[float] = []
    items: dict[str, list[float]] = {}
    gradients: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(rounds):
        found, sums = [], [0.0, 0.0]
        for number in range(every):
            for side, logged in enumerate((None, number == every - 1)):
                took = timed(logged)
                sums[side] += sum(took.values())
                found.append(took)
                gradients[bool(logged)].append(took["gradients"])
                if side == 0:
                    plain.append(sum(took.values()))
        ratios.append(sums[1] / sums[0])
        watch.start()
        case.evaluation(watch)
        found.append(watch.read())
        for took in found:
            for region in took.keys() - set(STEP):
                items.setdefault(region, []).append(took[region])
    spreads = {name: Spread.of(seconds) for name, seconds in items.items()}
    if case.case.stage.num_blocks:
        spreads[RECORDING] = recording(gradients[True], gradients[False])
    ordered = [name for name in (*EACH_STEP, *LOGGED, *EVALUATED) if name in spreads]
    return LiveCost(Spread.of(plain), {name: spreads[name] for name in ordered}, Spread.of(ratios))
