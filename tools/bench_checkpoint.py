"""How long a save holds up training, asynchronous and synchronous, as a share of a step.

    python tools/bench_checkpoint.py
    python tools/bench_checkpoint.py experiment=demo_tide processes=1 saves=5

Trains the model of an experiment (the demo's, by default) on this machine with the real engine, on the package's
own sources as text, in three variants that take turns: without saves, with asynchronous and with synchronous ones.

Columns: `stall` is the time that `save` keeps the training thread; `steps beside` the time by which steps are
longer while a thread writes (0 when synchronous); `share` the sum of both over the time of a step; `every 1000`
the same for a checkpoint every 1,000 steps. `written` counts from the snapshot to the committed manifest.
"""

import logging
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tide_mega.config.command_line import tool_entry
from tide_mega.config.hydra_door import compose, parse_tool_cli
from tide_mega.config.schema import TideConfig
from tide_mega.errors import ConfigError
from tide_mega.lab.bench.text import prepare_own_text
from tide_mega.lab.parity.pool import WorkerPool

VARIANTS = ("none", "asynchronous", "synchronous")


@dataclass
class Options:
    """What to measure."""

    experiment: str = "demo_tide"
    processes: int = 1
    saves: int = 3
    """Saves per variant."""
    between: int = 4
    """Steps after a save, before the next."""
    overrides: list[str] = field(default_factory=list)
    """Keys of the training's configuration, such as [memory=k2]."""
    folder: str | None = None
    """Where checkpoints are written; null uses the machine's temporary folder."""


@dataclass
class Reading:
    """One save with the steps after it, or as many steps without a save."""

    stall: float
    steps: list[float]
    """Seconds of each step after it."""
    written: float
    size: int


def measure(config: TideConfig, saves: int, between: int) -> dict[str, list[Reading]]:
    """Train in a pool's worker, variants taking turns; return this rank's readings by variant."""
    import torch

    from tide_mega.model.steps import compute_gradients
    from tide_mega.parallel.groups import World
    from tide_mega.training.trainer import Trainer

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // World.from_environment().size))
    trainer = Trainer(config, World.from_environment())
    readings: dict[str, list[Reading]] = {variant: [] for variant in VARIANTS}

    def step() -> float:
        start = time.perf_counter()
        batches = trainer.batches.next_step(trainer.course.batch)
        compute_gradients(trainer.engine, batches, config.trainer.z_loss, window=config.memory.window)
        trainer.engine.step(1e-4)
        trainer.state.take(trainer.course.batch, trainer.course.seq_length)
        trainer.checkpoints.poll()
        return time.perf_counter() - start

    try:
        step(), step()
        for turn in range(saves + 1):
            for variant in VARIANTS:
                trainer.checkpoints.config.asynchronous = variant == "asynchronous"
                reading = Reading(0.0, [], 0.0, 0)
                if variant != "none":
                    start = time.perf_counter()
                    trainer.checkpoints.save(trainer.state)
                    reading.stall = time.perf_counter() - start
                reading.steps = [step() for _ in range(between)]
                trainer.checkpoints.wait()
                if variant != "none" and (written := trainer.checkpoints.last_written) is not None:
                    reading.written, reading.size = written.seconds, written.size
                if turn:  # the first of each allocates buffers
                    readings[variant].append(reading)
        return readings
    finally:
        trainer.close()


def table(readings: dict[str, list[Reading]]) -> list[str]:
    """Return the lines of the table."""
    plain = statistics.median(second for reading in readings["none"] for second in reading.steps)
    lines = [
        f"a step takes {plain * 1e3:.1f} ms",
        f"{'save':<13}  {'MB':>8}  {'stall ms':>9}  {'steps beside ms':>15}  {'share of a step':>15}  "
        f"{'every 1000':>10}  {'written s':>9}  {'MB/s':>6}",
    ]
    for variant in VARIANTS[1:]:
        of = readings[variant]
        stall = statistics.median(reading.stall for reading in of)
        # Compared turn by turn, since the load of the machine varies.
        pairs = zip(of, readings["none"], strict=True)
        beside = max(0.0, statistics.median(sum(one.steps) - sum(two.steps) for one, two in pairs))
        share = (stall + beside) / plain
        size, written = of[-1].size / 1e6, statistics.median(reading.written for reading in of)
        lines.append(
            f"{variant:<13}  {size:>8.1f}  {stall * 1e3:>9.1f}  {beside * 1e3:>15.1f}  {share:>14.1%}  "
            f"{share / 1000:>10.4%}  {written:>9.3f}  {size / written:>6.0f}"
        )
    return lines


def main(argv: list[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    options: Any = parse_tool_cli(Options, sys.argv[1:] if argv is None else argv, doc=__doc__ or "")
    logging.getLogger().setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="tide-bench-", dir=options.folder) as name:
        folder = Path(name)
        words = [
            *(
                f"experiment={options.experiment}",
                f"data.path={prepare_own_text(folder, 2048)}",
                f"run.root={folder}",
            ),
            *("run.name=bench", "logging.wandb=disabled", "data.num_workers=0", "checkpoint.keep_last=1"),
            *(
                "trainer.max_steps=100000",
                "optim.warmup_steps=10",
                "cluster.peak_tflops=1",
                *options.overrides,
            ),
        ]
        try:
            config = compose(words, world_size=options.processes)
        except ConfigError as error:
            print(error, file=sys.stderr)
            return 2
        with WorkerPool(options.processes, timeout=3600) as pool:
            readings = pool.run(measure, config, options.saves, options.between)[0]
    print("\n".join(table(readings)))
    return 0


if __name__ == "__main__":
    tool_entry(main)
