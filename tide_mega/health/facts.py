"""What one process sees of its node."""

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
from tide_mega.training.code_snapshot import running_code
from tide_mega.training.environment import describe_environment


@dataclass
class Facts:
    """A process's report; plain JSON values. Those of the node are filled in by its first process alone."""

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
    """Bytes free where runs are written; None where that cannot be told."""
    tmp_free: int | None = None
    clock: float = 0.0
    """Seconds since 1970, taken at the same moment on all ranks as far as their messages allow."""
    outcome: Outcome | None = None
    """How the all-reduces went; None where there were none."""

    @classmethod
    def from_json(cls, report: dict[str, Any]) -> "Facts":
        """What `dataclasses.asdict` and JSON have made of facts."""
        outcome = report.pop("outcome")
        return cls(**report, outcome=None if outcome is None else Outcome(**outcome))

    @property
    def speaks_for_node(self) -> bool:
        """Whether this is the first process of its node."""
        return self.local_rank == 0


def collect(config: TideConfig, world: World) -> Facts:
    """Look at this process's node; what cannot be looked at becomes a problem, never an exception."""
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
    """Return what must be the same on all nodes: versions, and the code itself."""
    environment = describe_environment(device, world_size)
    found = {"python": environment["python"], "cuda": environment["cuda"], "code": running_code().id}
    found |= environment["packages"] | environment["optional"]
    return {name: str(version) if version else "absent" for name, version in found.items()}


def _try_gpu(device: torch.device) -> None:
    ones = torch.ones(2048, 2048, device=device, dtype=torch.bfloat16)
    if not bool(((ones @ ones) == 2048).all()):
        raise RuntimeError("a matrix product of ones is wrong")


def _gpus(problems: list[str]) -> list[str]:
    """Name and memory of each GPU; one that does not answer is a problem and keeps its place among the others."""
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
