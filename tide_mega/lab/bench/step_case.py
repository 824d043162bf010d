"""The step benchmark's case: a model under its engine with synthetic tokens, and one optimizer step of it.

Also the options that choose which step is timed, shared by the benchmarks of whole steps, and those of
tools/bench_step.py.
"""

import gc
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tide_mega.config.gpus import GPUS, find_gpu
from tide_mega.config.hydra_door import compose
from tide_mega.config.schema import TideConfig
from tide_mega.data.loader import TokenBatch
from tide_mega.errors import refuse
from tide_mega.lab.bench.measure import Stopwatch
from tide_mega.lab.bench.text import draw_ids
from tide_mega.memory.plan import MemoryPlan
from tide_mega.model.steps import compute_gradients
from tide_mega.parallel.device import Device
from tide_mega.parallel.groups import make_groups
from tide_mega.training.setup import build_engine, build_stage

REGIONS = ("gradients", "optimizer")


def draw_batches(config: TideConfig, accumulation: int, device: torch.device) -> list[TokenBatch]:
    """Draw a step's microbatches, ids by Zipf's law; the same for every K."""
    sequences, length = config.trainer.micro_batch_size, config.data.seq_length
    batches = []
    for number in range(accumulation):
        ids = draw_ids("zipf", sequences * (length + 1), config.model.vocab_size, seed=number)
        ids_BS = ids.view(sequences, length + 1).to(device)
        batches.append(TokenBatch(ids_BS[:, :-1].contiguous(), ids_BS[:, 1:].contiguous()))
    return batches


class StepCase:
    """Stage, engine and batches of one K."""

    def __init__(self, config: TideConfig, device: Device, accumulation: int) -> None:
        """Build everything; `state_bytes` is what that allocated on a GPU."""
        before = _allocated(device)
        groups = make_groups(config.parallel, config.trainer.seed, config.memory.owners)
        self.config = config
        self.device = device
        self.stage = build_stage(config, groups, device)
        self.engine = build_engine(config, self.stage, device, accumulation)
        self.batches = draw_batches(config, accumulation, device.torch_device)
        self.state_bytes = _allocated(device) - before

    @property
    def router_in_norm(self) -> bool:
        """Whether the router shares the passes of the norm before it."""
        return self.stage.memory.kernels.norm_router == "triton"

    def plan(self) -> MemoryPlan:
        """Plan the reading of the step."""
        return self.stage.memory.plan([batch.tokens_BT for batch in self.batches])

    def step(self, watch: Stopwatch) -> None:
        """Run one optimizer step; marks `REGIONS`."""
        config = self.config
        compute_gradients(self.engine, self.batches, config.trainer.z_loss, window=config.memory.window)
        watch.mark("gradients")
        self.engine.step(config.optim.lr)
        watch.mark("optimizer")

    def peak_bytes(self) -> int:
        """Return the GPU allocator's peak for this K in a step: its state plus what the step needs above it."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step(Stopwatch(self.device.torch_device))
        torch.cuda.synchronize()
        return self.state_bytes + torch.cuda.max_memory_allocated() - before

    def close(self) -> None:
        """Free everything; the case cannot be used again."""
        self.engine.close()
        del self.engine, self.stage, self.batches
        gc.collect()
        if self.device.is_cuda:
            torch.cuda.empty_cache()


def _allocated(device: Device) -> int:
    return torch.cuda.memory_allocated() if device.is_cuda else 0


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
        """Refuse invalid options.

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
        """Refuse a file in a folder that does not exist; raises ConfigError."""
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
    """Return the overrides for K blocks: its preset, or the nearest one adjusted to K."""
    if blocks == 0:
        return ["memory=none"]
    return [f"memory=k{min(PRESETS, key=lambda preset: abs(preset - blocks))}", f"memory.num_blocks={blocks}"]


@dataclass
class StepOptions(StepChoice):
    """Options of `tools/bench_step.py`."""

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
        """Refuse invalid options.

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
        if find_gpu(self.gpu) is None:
            refuse("gpu", self.gpu, "is unknown", f"use {', '.join(gpu.name for gpu in GPUS)}")
        self.can_be_written("plot")
