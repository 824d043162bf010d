"""Answers the questions of tools/gpu_check.sh: versions and libraries, the largest model that fits, throughput."""

import importlib
import importlib.metadata
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from tide_mega.config.command_line import tool_entry
from tide_mega.config.device_memory import device_memory
from tide_mega.config.hydra_door import compose, parse_tool_cli
from tide_mega.errors import ConfigError

CANDIDATES = ("tide_8e_3b", "tide_8e_1b", "tide_8e_750m", "tide_8e_350m")
BATCH = ("trainer.global_batch_size=16", "trainer.micro_batch_size=2")
"""Of tools/gpu_check.sh's training of the model that fits."""
USABLE_SHARE = 0.93
"""Share of the device's memory for a step; the rest is for the CUDA context and what the allocator cannot use."""
OPTIONAL = ("apex", "flash_attn")


@dataclass
class Options:
    """What to print; without arguments, versions and libraries."""

    fits: bool = False
    """Name the largest paper experiment that trains on this GPU alone, in microbatches of 2."""
    metrics: str | None = None
    """A run's metrics.jsonl: print its last loss, tokens/s and MFU."""


def versions() -> list[str]:
    """Return the versions of torch, triton and the engines, and which optional libraries import."""
    lines = []
    for name in ("torch", "triton", "megatron-core", "deepspeed"):
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name} not installed")
    return lines + [_describe_optional(name) for name in OPTIONAL]


def _describe_optional(name: str) -> str:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        return f"{name}: not importable ({error})"
    except Exception as error:  # a library built for another CUDA may raise anything
        return f"{name}: installed but broken ({type(error).__name__}: {error})"
    return f"{name}: found, version {getattr(module, '__version__', 'unknown')}"


def largest_fitting(memory_bytes: int) -> str:
    """Return the first of `CANDIDATES` whose training step fits.

    Raises:
        ConfigError: none fits.
    """
    for name in CANDIDATES:
        config = compose([f"experiment={name}", *BATCH], validate=False)
        needed = device_memory(config, world_size=1).total
        if needed <= USABLE_SHARE * memory_bytes:
            return name
    raise ConfigError(
        f"No paper model fits {memory_bytes / 1e9:.1f} GB; the smallest, {CANDIDATES[-1]}, needs "
        f"{needed / 1e9 / USABLE_SHARE:.1f} GB."
    )


def last_throughput(path: Path) -> str:
    """Return step, loss, tokens/s and MFU of the last line that has them.

    Raises:
        ConfigError: the file is missing or has no such line.
    """
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: the training wrote no metrics.")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    measured = [record for record in records if record.get("tokens_per_second") is not None]
    if not measured:
        raise ConfigError(f"{path} has no line with tokens_per_second: train for more steps.")
    last = measured[-1]
    mfu = "unknown" if last.get("mfu") is None else f"{100 * last['mfu']:.1f} %"
    return (
        f"step {last['step']}: loss {last['loss']:.4f}, {last['tokens_per_second']:,.0f} tokens/s, MFU {mfu}"
    )


def main() -> None:
    """Print the requested facts."""
    options = parse_tool_cli(Options, doc=__doc__ or "")
    try:
        if options.fits:
            import torch

            print(largest_fitting(torch.cuda.get_device_properties(0).total_memory))
        elif options.metrics is not None:
            print(last_throughput(Path(options.metrics)))
        else:
            print("\n".join(versions()))
    except ConfigError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    tool_entry(main)
