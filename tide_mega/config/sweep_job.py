"""Ranks of a process that Hydra's submitit launcher has started: SLURM's names in torch.distributed's."""

import os
import subprocess
from collections.abc import MutableMapping

FIRST_PORT, PORTS = 20_000, 12_000
"""Below the ephemeral range; `slurm/body.sh` uses the same."""


def adopt_ranks(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, WORLD_SIZE and their kin in a submitit job; leave every other process as it is."""
    if environment.get("SUBMITIT_EXECUTOR") != "slurm" or "RANK" in environment:
        return
    nodes = _hostnames(environment["SLURM_JOB_NODELIST"])
    job, restarts = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_RESTART_COUNT") or 0)
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["WORLD_SIZE"] = environment["SLURM_NTASKS"]
    environment["LOCAL_WORLD_SIZE"] = str(int(environment["SLURM_NTASKS"]) // len(nodes))
    environment.setdefault("MASTER_ADDR", "127.0.0.1" if len(nodes) == 1 else nodes[0])
    environment.setdefault("MASTER_PORT", str(FIRST_PORT + (job + 131 * restarts) % PORTS))
    if len(nodes) == 1:
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _hostnames(node_list: str) -> list[str]:
    if "[" not in node_list:
        return node_list.split(",")
    command = ["scontrol", "show", "hostnames", node_list]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
