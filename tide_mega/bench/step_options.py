"""The options of tools/bench_step.py, and the training configuration they stand for."""

from dataclasses import dataclass, field
from pathlib import Path

from tide_mega.bench.gpus import GPUS
from tide_mega.config.errors import refuse
from tide_mega.config.hydra_door import compose
from tide_mega.config.schema import TideConfig


@dataclass
class StepOptions:
    """What a user may say."""

    model: str = "demo"
    """demo, 350m, 750m, 1b, 3b, or auto: the largest whose state fits the GPU at every K (1b for predict)."""
    blocks: list[int] = field(default_factory=lambda: [0, 2, 4, 8, 16, 24])
    """Values of K; 0 is always measured."""
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
    threads: int | None = None
    """CPU threads; null means all cores."""
    steps: int = 10
    """Timed steps of each K."""
    warmup: int = 3
    op_repeats: int = 7
    """Timed turns of each operation of the breakdown; 0 leaves it out."""
    peaks: bool = True
    """Whether to measure memory too."""
    bandwidth_mb: int | None = None
    """10^6 bytes of each tensor of the bandwidth's measurement; null chooses by device."""
    overrides: list[str] = field(default_factory=list)
    """Further words of the training's command line, as in overrides=kernels.mix=naive."""
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
    out: str | None = None
    """JSON file to write."""
    plot: str | None = None
    """PNG file to write."""


def validate(options: StepOptions) -> None:
    """Refuse options that cannot be meant.

    Raises:
        ConfigError: naming the option.
    """
    at_least_one = ("micro_batch", "accumulation", "steps", "seq_length", "layers", "threads", "bandwidth_mb")
    for key in (*at_least_one, "replicas"):
        value = getattr(options, key)
        if value is not None and value < 1:
            refuse(key, value, "is too small", "give 1 or more")
    for key in ("warmup", "op_repeats"):
        if getattr(options, key) < 0:
            refuse(key, getattr(options, key), "is negative", "give 0 or more")
    if not options.blocks or min(options.blocks) < 0:
        refuse("blocks", options.blocks, "is not a list of numbers from 0", "give one or more, as in 0,8")
    if not options.accumulations or min(options.accumulations) < 1:
        refuse("accumulations", options.accumulations, "is not a list of numbers from 1", "give, say, 1,8")
    for key in ("mfu", "bandwidth_share"):
        if not 0 < getattr(options, key) <= 1:
            refuse(key, getattr(options, key), "is not a share", "give more than 0 and at most 1")
    for key, choices in {
        "precision": ("auto", "bf16", "fp32"),
        "device": ("auto", "cpu", "cuda"),
        "gpu": tuple(GPUS),
    }.items():
        if getattr(options, key) not in choices:
            refuse(key, getattr(options, key), "is unknown", f"use {', '.join(choices)}")
    for key in ("out", "plot"):
        path = getattr(options, key)
        if path is not None and not Path(path).parent.is_dir():
            refuse(key, path, "lies in a folder that does not exist", "make the folder first")


def configuration(options: StepOptions, model: str, blocks: int, precision: str) -> TideConfig:
    """Compose the configuration a training of K = `blocks` would have.

    Raises:
        ConfigError: an option or override is wrong.
    """
    length = options.seq_length or (256 if model == "demo" else 2048)
    words = [f"model={model}", f"memory.num_blocks={blocks}", f"trainer.precision={precision}"]
    words += [f"data.seq_length={length}", f"trainer.micro_batch_size={options.micro_batch}"]
    words += [f"trainer.global_batch_size={options.micro_batch * options.accumulation}"]
    words += [] if options.layers is None else [f"model.num_layers={options.layers}"]
    return compose([*words, *options.overrides], world_size=1)
