"""What SLURM's environment variables tell about the job that a process belongs to."""

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class SlurmJob:
    """The job that a process belongs to."""

    id: str
    restarts: int
    """How often SLURM has restarted this job."""
    nodes: int
    end_time: float | None
    """Unix time at which the time limit is reached; None if there is no limit or it is not known."""
    cluster: str | None = None
    """SLURM's name of the cluster."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "SlurmJob | None":
        """Read SLURM's variables; return None outside a job.

        Jobs of Hydra's submitit launcher get no end time here: submitit handles their time limit itself.
        """
        job = environment.get("SLURM_ARRAY_JOB_ID") or environment.get("SLURM_JOB_ID")
        if not job:
            return None
        task = environment.get("SLURM_ARRAY_TASK_ID")
        end = environment.get("SLURM_JOB_END_TIME", "")
        return cls(
            id=f"{job}_{task}" if task else job,
            restarts=_integer(environment.get("SLURM_RESTART_COUNT"), 0),
            nodes=_integer(environment.get("SLURM_JOB_NUM_NODES"), 1),
            end_time=float(end) if end.isdigit() and "SUBMITIT_EXECUTOR" not in environment else None,
            cluster=environment.get("SLURM_CLUSTER_NAME") or None,
        )


def _integer(text: str | None, default: int) -> int:
    return int(text) if text and text.isdigit() else default
