"""What the benchmarks of whole steps have in common: the options that say which step, and its configuration."""

from dataclasses import dataclass, field
from pathlib import Path

from tide_mega.config.errors import refuse
from tide_mega.config.hydra_door import compose
from tide_mega.config.schema import TideConfig

PRESETS = (2, 4, 8, 16, 24)
"""K of conf/memory."""


@dataclass
class StepChoice:
    """Which training step, and where it is taken."""

    model: str = "demo"
    """demo, 350m, 750m, 1b or 3b."""
    layers: int | None = None
    """Instead of the model's."""
    micro_batch: int = 8
    """Sequences of a microbatch."""
    accumulation: int = 1
    """Microbatches of a step."""
    seq_length: int | None = None
    """Tokens of a sequence; null means 2048, and 256 for demo."""
    precision: str = "auto"
    """bf16, fp32, or auto: bf16 where the device computes faster in it."""
    device: str = "auto"
    """auto, cpu or cuda."""
    threads: int | None = None
    """CPU threads; null means all cores."""
    overrides: list[str] = field(default_factory=list)
    """Further words of the training's command line, as in overrides=kernels.mix=naive."""
    out: str | None = None
    """JSON file to write."""

    def validate(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            ConfigError: naming the option.
        """
        self.at_least(1, "micro_batch", "accumulation", "seq_length", "layers", "threads")
        self.one_of("precision", ("auto", "bf16", "fp32"))
        self.one_of("device", ("auto", "cpu", "cuda"))
        self.can_be_written("out")

    def at_least(self, least: int, *keys: str) -> None:
        """Refuse a smaller number; raises ConfigError."""
        for key in keys:
            value = getattr(self, key)
            if value is not None and value < least:
                refuse(key, value, "is too small" if value >= 0 else "is negative", f"give {least} or more")

    def one_of(self, key: str, choices: tuple[str, ...]) -> None:
        """Refuse another word; raises ConfigError."""
        if getattr(self, key) not in choices:
            refuse(key, getattr(self, key), "is unknown", f"use {', '.join(choices)}")

    def can_be_written(self, key: str) -> None:
        """Refuse a file in a folder that is not there; raises ConfigError."""
        path = getattr(self, key)
        if path is not None and not Path(path).parent.is_dir():
            refuse(key, path, "lies in a folder that does not exist", "make the folder first")

    def configuration(self, model: str, blocks: int, precision: str) -> TideConfig:
        """Compose the configuration a training of K = `blocks` would have.

        Raises:
            ConfigError: an option or override is wrong.
        """
        length = self.seq_length or (256 if model == "demo" else 2048)
        words = [f"model={model}", *memory_words(blocks), f"trainer.precision={precision}"]
        words += [f"data.seq_length={length}", f"trainer.micro_batch_size={self.micro_batch}"]
        words += [f"trainer.global_batch_size={self.micro_batch * self.accumulation}"]
        words += [] if self.layers is None else [f"model.num_layers={self.layers}"]
        return compose([*words, *self.overrides], world_size=1)


def memory_words(blocks: int) -> list[str]:
    """Return what a user's command line says for K blocks: its preset, or of a K without one the nearest."""
    if blocks == 0:
        return ["memory=none"]
    return [f"memory=k{min(PRESETS, key=lambda preset: abs(preset - blocks))}", f"memory.num_blocks={blocks}"]
