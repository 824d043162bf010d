"""The options of tools/bench_step.py."""

from dataclasses import dataclass, field

from tide_mega.bench.gpus import GPUS
from tide_mega.bench.step_choice import StepChoice
from tide_mega.config.errors import refuse


@dataclass
class StepOptions(StepChoice):
    """What a user may say."""

    model: str = "demo"
    """demo, 350m, 750m, 1b, 3b, or auto: the largest whose state fits the GPU at every K (1b for predict)."""
    blocks: list[int] = field(default_factory=lambda: [0, 2, 4, 8, 16, 24])
    """Values of K; 0 is always measured."""
    steps: int = 10
    """Timed steps of each K."""
    warmup: int = 3
    op_repeats: int = 7
    """Timed turns of each operation of the breakdown; 0 leaves it out."""
    peaks: bool = True
    """Whether to measure memory too."""
    bandwidth_mb: int | None = None
    """10^6 bytes of each tensor of the bandwidth's measurement; null chooses by device."""
    predict: bool = False
    """Print what byte counts predict for `gpu` instead of measuring."""
    gpu: str = "h100"
    """h100, h200 or b200, for predict."""
    mfu: float = 0.55
    """Assumed of K = 0, for predict."""
    bandwidth_share: float = 0.8
    """Share of the data sheet's bandwidth that the memory's operations are assumed to reach, for predict."""
    accumulations: list[int] = field(default_factory=lambda: [1, 8])
    """Microbatches of a step, for predict."""
    replicas: int = 1
    """Data-parallel ranks that share the optimizer's work (ZeRO-1), for predict; their traffic is not counted."""
    plot: str | None = None
    """PNG file to write."""

    def validate(self) -> None:
        """Refuse options that cannot be meant.

        Raises:
            ConfigError: naming the option.
        """
        super().validate()
        self.at_least(1, "steps", "bandwidth_mb", "replicas")
        self.at_least(0, "warmup", "op_repeats")
        if not self.blocks or min(self.blocks) < 0:
            refuse("blocks", self.blocks, "is not a list of numbers from 0", "give one or more, as in 0,8")
        if not self.accumulations or min(self.accumulations) < 1:
            refuse("accumulations", self.accumulations, "is not a list of numbers from 1", "give, say, 1,8")
        for key in ("mfu", "bandwidth_share"):
            if not 0 < getattr(self, key) <= 1:
                refuse(key, getattr(self, key), "is not a share", "give more than 0 and at most 1")
        self.one_of("gpu", tuple(GPUS))
        self.can_be_written("plot")
