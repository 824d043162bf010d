"""What one process finds out about its node."""

import os
import shutil
import socket
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tide_mega.config.schema import TideConfig
from tide_mega.health.collective import Outcome
from tide_mega.parallel.device import Device, choose_device
from tide_mega.parallel.groups import World
from tide_mega.run.code import running_code
from tide_mega.run.environment import describe_environment


@dataclass
class Facts:
    """A process's report, as plain JSON values; only a node's first process fills in those of the node."""

    rank: int
    node: str
    local_rank: int
    local_size: int
    device_works: bool = True
    problems: list[str] = field(default_factory=list)
    """What this process found wrong by itself."""
    versions: dict[str, str] = field(default_factory=dict)
    gpus: list[str] = field(default_factory=list)
    """Name and memory of each GPU that is visible."""
    root_free: int | None = None
    """Free bytes where runs are written; None if unknown."""
    tmp_free: int | None = None
    clock: float = 0.0
    """Unix time, taken as simultaneously on all ranks as their messages allow."""
    outcome: Outcome | None = None
    """Result of the all-reduces; None if there were none."""

    @classmethod
    def from_json(cls, report: dict[str, Any]) -> "Facts":
        """Rebuild facts from `dataclasses.asdict` after a round trip through JSON."""
        outcome = report.pop("outcome")
        return cls(**report, outcome=None if outcome is None else Outcome(**outcome))

    @property
    def speaks_for_node(self) -> bool:
        """Whether this is the first process of its node."""
        return self.local_rank == 0


def collect(config: TideConfig, world: World) -> Facts:
    """Examine this process's node; failures become problems in the report, never exceptions."""
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    facts = Facts(world.rank, node, world.local_rank, world.local_size)
    device: Device | None = None
    try:
        device = choose_device(config.cluster.device, world.local_rank)
        if device.is_cuda:
            _try_gpu(device.torch_device)
    except Exception as error:  # a broken GPU fails in many ways
        facts.problems.append(f"local rank {world.local_rank} cannot use its GPU: {_line(error)}")
        facts.device_works = False
    if facts.speaks_for_node:
        if device is not None:
            facts.versions = versions(device.torch_device, world.size)
            if device.is_cuda:
                facts.gpus = _gpus(facts.problems)
        _look_at_disks(facts, Path(config.run.root))
    return facts


def versions(device: torch.device, world_size: int) -> dict[str, str]:
    """Return what must be equal on all nodes: versions, and the code itself."""
    environment = describe_environment(device, world_size)
    found = {"python": environment["python"], "cuda": environment["cuda"], "code": running_code().id}
    found |= environment["packages"] | environment["optional"]
    return {name: str(version) if version else "absent" for name, version in found.items()}


def _try_gpu(device: torch.device) -> None:
    ones = torch.ones(2048, 2048, device=device, dtype=torch.bfloat16)
    if not bool(((ones @ ones) == 2048).all()):
        raise RuntimeError("a matrix product of ones is wrong")


def _gpus(problems: list[str]) -> list[str]:
    """Return name and memory of each GPU; one that does not respond is a problem but keeps its place."""
    return [_gpu(index, problems) for index in range(torch.cuda.device_count())]


def _gpu(index: int, problems: list[str]) -> str:
    try:
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
    except Exception as error:  # a broken GPU fails in many ways
        problems.append(f"GPU {index} does not answer: {_line(error)}")
        return "unusable"
    if free < 0.8 * total:
        problems.append(f"GPU {index} has {(total - free) / 2**30:.0f} GiB in use by someone else")
    return f"{properties.name} {properties.total_memory / 2**30:.0f} GiB"


def _look_at_disks(facts: Facts, root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        facts.root_free = shutil.disk_usage(root).free
    except OSError as error:
        facts.problems.append(f"run.root={root} cannot be used: {_line(error)}")
    temporary = os.environ.get("TMPDIR") or tempfile.gettempdir()
    try:
        with tempfile.TemporaryFile(dir=temporary) as file:
            file.write(b"x")
        facts.tmp_free = shutil.disk_usage(temporary).free
    except OSError as error:
        facts.problems.append(f"TMPDIR={temporary} cannot be written: {_line(error)}")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
