"""Small real trainings: a prepared dataset and a configuration that trains on it in seconds."""

from pathlib import Path
from typing import Any

from tide_mega.config.hydra_door import compose
from tide_mega.config.schema import TideConfig
from tide_mega.metrics.jsonl import read_metrics
from tide_mega.parallel.groups import World
from tide_mega.training.trainer import Trainer

TINY = [
    "experiment=demo_tide",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.vocab_size=640",
    "memory=k2",
    "memory.owners=tensor",
    "data.seq_length=32",
    "data.num_workers=0",
    "trainer.precision=fp32",
    "trainer.global_batch_size=8",
    "trainer.micro_batch_size=2",
    "trainer.max_steps=6",
    "trainer.eval_every=3",
    "trainer.eval_sequences=10",
    "optim.warmup_steps=2",
    "checkpoint.every=3",
    "logging.every=2",
    "cluster.device=cpu",  # also on a machine with GPUs: the workers are joined by gloo
    "cluster.threads=1",
    "cluster.peak_tflops=1",
]


def tiny(data: Path, root: Path, *overrides: str, world_size: int = 1) -> TideConfig:
    """Compose a tiny training; later overrides win."""
    words = [*TINY, f"data.path={data}", f"run.root={root}", "run.name=tiny", *overrides]
    return compose(words, world_size=world_size)


def train_here(config: TideConfig) -> int:
    """Train in a pool's worker, where torch.distributed is up; return the steps done."""
    trainer = Trainer(config, World.from_environment())
    try:
        trainer.run()
        return trainer.state.step
    finally:
        trainer.close()


class KilledError(Exception):
    """Ends a training where a kill would."""


def train_until(config: TideConfig, step: int) -> int | None:
    """Stop as a kill would, after `step` steps: nothing is saved or flushed for it."""
    trainer = Trainer(config, World.from_environment())
    step_engine = trainer.engine.step

    def counted(lr: float) -> bool:
        if trainer.state.step == step:
            raise KilledError
        return step_engine(lr)

    trainer.engine.step = counted  # type: ignore[method-assign]
    try:
        trainer.run()
    except KilledError:
        return trainer.state.step
    finally:
        trainer.close()
    return None


def curve(metrics: Path) -> list[dict[str, Any]]:
    """Everything a run logged but the machine's part."""
    machine = {
        "tokens_per_second",
        "mfu",
        "step_seconds",
        "eta_seconds",
        "goodput",
        "slowest_ratio",
        "slow_ranks",
        "memory_bytes",
        "peak_memory_bytes",
        "exchanged_bytes_per_step",
    }
    return [{k: v for k, v in record.items() if k not in machine} for record in read_metrics(metrics)]
