"""Builds the parts of a training run (precision, streams, model, engine, deciles, checkpoints) and logs them."""

import logging
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from tide_mega.checkpoint import Checkpointer, Identity
from tide_mega.config.schema import TideConfig
from tide_mega.config.sizes import count_parameters
from tide_mega.data.frequency import UNSEEN, DecileTable
from tide_mega.data.stream import TokenStream
from tide_mega.errors import ConfigError
from tide_mega.model.stage import TideStage
from tide_mega.model.weights import initialise
from tide_mega.parallel.device import Device, attention_name, describe_libraries
from tide_mega.parallel.engine import Engine
from tide_mega.parallel.engine_settings import EngineOptions, optimizer_name
from tide_mega.parallel.groups import ParallelGroups
from tide_mega.run.course import Course
from tide_mega.run.folder import RunFolder, read_config
from tide_mega.training.optimizer import parameter_groups
from tide_mega.training.throughput import describe_peak, peak_tflops

log = logging.getLogger(__name__)


def resolve_precision(config: TideConfig, device: Device) -> TideConfig:
    """Resolve `trainer.precision=auto`; collective.

    A resumed run keeps the precision it started with. A new one takes bf16 if matrix products are faster in it on
    the devices of all processes, else fp32.
    """
    if config.trainer.precision != "auto":
        return config
    folder = RunFolder.of(config)
    if folder.config.exists():
        precision = read_config(folder).trainer.precision
    else:
        is_fast = torch.tensor(int(device.has_fast_bf16()), device=device.torch_device)
        dist.all_reduce(is_fast, op=dist.ReduceOp.MIN)
        precision = "bf16" if is_fast else "fp32"
    return replace(config, trainer=replace(config.trainer, precision=precision))


def open_stream(config: TideConfig, split: str, *, is_quiet: bool) -> TokenStream:
    """Open a split of `data.path`; skipped shards are logged unless `is_quiet`.

    Raises:
        ConfigError: the vocabulary of the data is larger than the model's.
        DataError: the data is missing or damaged.
    """
    model = config.model
    stream = TokenStream.of_run(
        config.data, split, logger=logging.getLogger("tide_mega.silent") if is_quiet else log
    )
    if stream.vocab_size > model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={model.vocab_size} is smaller than the vocabulary of {config.data.path}, "
            f"{stream.vocab_size}: set model.vocab_size to {stream.vocab_size} or more."
        )
    return stream


def build_stage(config: TideConfig, groups: ParallelGroups, device: Device) -> TideStage:
    """Build this process's stage of the model and fill it with its share of the initial weights."""
    stage = TideStage(config, groups, device.torch_device)
    initialise(stage, config.model, config.memory, config.trainer.seed)
    return stage.to(device.torch_device)


def build_engine(config: TideConfig, stage: TideStage, device: Device, accumulation: int) -> Engine:
    """Wrap a stage in a DeepSpeed engine; `accumulation` is the number of micro-batches in a step."""
    options = EngineOptions(
        zero_stage=config.parallel.zero_stage,
        precision=config.trainer.precision,
        clip_grad=config.optim.clip_grad,
        micro_batch_size=config.trainer.micro_batch_size,
        accumulation=accumulation,
        shares_norm=config.memory.num_blocks > 0 and config.memory.owners == "tensor_data",
    )
    parameters = parameter_groups(stage, config.optim)
    return Engine(stage, parameters, config.optim, options, stage.groups, device, stage.memory.owned)


def decile_bins(config: TideConfig) -> Tensor:
    """Return the decile of each type of the model's vocabulary [V]; ids beyond the tokenizer's are `UNSEEN`."""
    bins_V = torch.full((config.model.vocab_size,), UNSEEN, dtype=torch.int8)
    known = torch.from_numpy(DecileTable.load(config.data.path).bin_of_type)
    bins_V[: known.numel()] = known
    return bins_V


def open_checkpoints(
    config: TideConfig, folder: RunFolder, engine: Engine, stream: TokenStream, bins_V: Tensor
) -> Checkpointer:
    """Open the run folder's checkpoints, accepting only this model, data and deciles [V]; collective."""
    bins = bins_V.cpu().numpy().tobytes()
    identity = Identity.of(config, stream.fingerprint, bins, dist.get_world_size())
    return Checkpointer(folder.checkpoints, engine, config.model, config.checkpoint, identity)


def device_peak(config: TideConfig, device: Device, *, is_quiet: bool) -> float | None:
    """Return the peak TFLOP/s for MFU: the configured value, else the known one of the device, else None."""
    configured = config.cluster.peak_tflops
    peak = configured or peak_tflops(device.name, config.trainer.precision)
    if not is_quiet:
        log.info(describe_peak(device.name, peak, configured=configured is not None))
    return peak


def describe(
    config: TideConfig,
    course: Course,
    stage: TideStage,
    device: Device,
    stream: TokenStream,
    held_out: TokenStream,
) -> None:
    """Log the model, topology, precision, kernels, libraries and data of the run."""
    groups = stage.groups
    count = count_parameters(config.model, config.memory)
    log.info(
        "%s: %s parameters in the base model, %s in %d memory blocks",
        config.run.name,
        f"{count.base:,}",
        f"{count.total - count.base:,}",
        config.memory.num_blocks,
    )
    log.info(
        "%d processes (tensor %d, pipeline %d, data %d) on %s, %d threads each; ZeRO-%d, %s, %s, attention by %s",
        groups.model.size() * groups.data_size,
        groups.tensor_size,
        groups.pipeline.size(),
        groups.data_size,
        device.name,
        torch.get_num_threads(),
        config.parallel.zero_stage,
        config.trainer.precision,
        optimizer_name(device),
        attention_name(device),
    )
    if config.trainer.deterministic:
        log.info("deterministic: the same steps at this topology give the same losses to the last bit")
    if stage.num_blocks:
        log.info("kernels: %s", stage.memory.kernels.describe())
    log.info("optional libraries: %s", describe_libraries())
    log.info(
        "%s: %s training tokens, %s held out; to train %s, in batches of %s tokens",
        config.data.path,
        f"{stream.num_tokens:,}",
        f"{held_out.num_tokens:,}",
        course.describe(),
        f"{course.batch * course.seq_length:,}",
    )
