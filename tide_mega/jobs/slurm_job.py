"""What SLURM's environment tells of the job around a training process."""

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class SlurmJob:
    """The job that a process belongs to."""

    id: str
    restarts: int
    """How often SLURM has started this job again."""
    nodes: int
    end_time: float | None
    """When the time limit strikes, in seconds since 1970; None where there is no limit, or it is not known."""
    cluster: str | None = None
    """Its name, by which SLURM tells clusters apart."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "SlurmJob | None":
        """Read SLURM's variables; None outside a job.

        A job of Hydra's submitit launcher has no end time here: submitit answers its time limit itself.
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
