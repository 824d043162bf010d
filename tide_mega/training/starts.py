"""The history of a run's starts, in environment.json: when, in which job, from which code and configuration."""

import json
import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tide_mega.config.stored import parse_json
from tide_mega.data.atomic import write_bytes
from tide_mega.jobs.slurm_job import SlurmJob

log = logging.getLogger(__name__)


def add_start(
    path: Path,
    environment: dict[str, Any],
    *,
    code: str | None,
    config: str,
    job: SlurmJob | None,
    data: str | None = None,
) -> int:
    """Write environment.json: what this start runs on, and `starts`, one entry for each start so far.

    Args:
        path: environment.json.
        environment: what this start runs on.
        code: id of the copy of the code (`code/<id>.tar.gz`), None where there is none.
        config: file in the run folder with this start's configuration.
        job: the SLURM job, if there is one.
        data: fingerprint of the dataset, None where there is none yet.

    Returns:
        How many starts there have been, this one included.
    """
    start = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "job": job.id if job else None,
        "restart": job.restarts if job else None,
        "nodes": job.nodes if job else None,
        "world_size": environment["world_size"],
        "git": environment["git"],
        "code": code,
        "config": config,
        "data": data,
    }
    starts = [*read_starts(path), start]
    content = json.dumps(environment | {"starts": starts}, indent=2)
    write_bytes(path, content.encode() + b"\n")
    return len(starts)


def read_starts(path: Path) -> list[dict[str, Any]]:
    """Return the starts noted in environment.json, oldest first; none where there is no such file."""
    if not path.exists():
        return []
    try:
        return list(parse_json(path.read_text(encoding="utf-8"))["starts"])
    except (ValueError, KeyError, TypeError):
        log.warning("%s does not list the starts before this one: its list begins anew", path)
        return []


def keep_config(folder: Path, text: str, run_folder: Path) -> str:
    """Write a start's configuration to `folder`, unless an earlier start had the same; return its name in the run.

    Files are numbered in the order in which they came.
    """
    content = text.encode()
    known = sorted(folder.glob("config-*.yaml"))
    for path in reversed(known):
        if path.read_bytes() == content:
            return path.relative_to(run_folder).as_posix()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"config-{len(known) + 1:04d}.yaml"
    write_bytes(path, content)
    return path.relative_to(run_folder).as_posix()
