"""What `trainer.precision=auto` means for a run."""

from dataclasses import replace

import torch
import torch.distributed as dist

from tide_mega.config.schema import TideConfig
from tide_mega.parallel.device import Device
from tide_mega.training.runfolder import RunFolder, read_config


def resolve_precision(config: TideConfig, device: Device) -> TideConfig:
    """Replace `auto`: what the run began with, else bf16 where every process computes faster in it; collective."""
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
