"""Resident memory of a process, and of a function called in a fresh one. Linux."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

EXACT_FREE = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""What is freed leaves the process, so that its size is what it holds and not what its allocator keeps."""


def resident(key: str) -> int:
    """Bytes of this process: VmRSS resident now, VmHWM the most since `forget_peak`."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def forget_peak() -> None:
    """Let VmHWM start again from what is resident."""
    Path("/proc/self/clear_refs").write_text("5")


def in_fresh_process(module: str, task: dict[str, Any], threads: int) -> dict[str, int]:
    """Run `python -m module <task as JSON>`; return the JSON of its last line.

    Raises:
        RuntimeError: it failed; its last words are shown.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, json.dumps(task)],
        env={**os.environ, **EXACT_FREE, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise RuntimeError(f"{module} with {task} ended with status {done.returncode}\n{last}")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found
