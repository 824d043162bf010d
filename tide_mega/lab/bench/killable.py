"""Trainings to be killed, and inspection of what a kill leaves behind."""

import hashlib
import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from tide_mega.checkpoint.folder import CheckpointFolder, verify
from tide_mega.checkpoint.weights import whole_tensors
from tide_mega.config.schema import TideConfig
from tide_mega.training.trainer import train

PROCESSES = 2
MARK = "left-by-a-kill"
"""An empty file put into the remains of a killed save; the next save removes it with them."""
LIFE_SECONDS = 240.0
"""Time limit for a training to end or to reach the instant of its planned kill."""


def train_rank(config: TideConfig, rank: int, port: int, log_file: Path) -> None:
    """Run one process of a training."""
    descriptor = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(PROCESSES))
    os.environ.update(LOCAL_WORLD_SIZE=str(PROCESSES), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, force=True)
    train(config)


class Training:
    """The processes of one life of a training, forked from a server that has only done the imports."""

    def __init__(self, config: TideConfig, log_file: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tide_mega.lab.bench.killable"])
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.processes: list[BaseProcess] = [
            context.Process(target=train_rank, args=(config, rank, port, log_file))
            for rank in range(PROCESSES)
        ]
        for process in self.processes:
            process.start()
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def is_over(self) -> bool:
        """Whether every process has ended, or one has failed."""
        codes = [process.exitcode for process in self.processes]
        return all(code == 0 for code in codes) or any(code not in (None, 0) for code in codes)

    def kill(self) -> None:
        """SIGKILL every process, now."""
        for process in self.processes:
            if process.pid is not None and process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.join()

    def finish(self) -> bool:
        """Wait for the end; return whether every process ended well."""
        while not self.is_over() and self.seconds < LIFE_SECONDS:
            time.sleep(0.01)
        ended_well = all(process.exitcode == 0 for process in self.processes)
        self.kill()
        return ended_well


def saves_of(checkpoints: Path) -> list[Path]:
    """Return the saves in progress in this life; remains of earlier kills are marked and excluded."""
    return [path for path in checkpoints.glob("*.partial") if not (path / MARK).exists()]


def state_of(checkpoints: Path) -> str:
    """Return the state in which a kill left the folder."""
    for partial in saves_of(checkpoints):
        if (partial / "manifest.json").exists():
            return "manifest written, not renamed"
        return "half a save" if any(partial.iterdir()) else "an empty save"
    return "no save under way" if any(checkpoints.glob("step-*")) else "nothing saved yet"


def digest(checkpoints: Path) -> str:
    """Return the SHA-256 of everything in the newest checkpoint: names and fp32 values."""
    checksum = hashlib.sha256()
    for name, values in whole_tensors(CheckpointFolder(checkpoints).complete()[-1]):
        checksum.update(name.encode())
        checksum.update(values.numpy().tobytes())
    return checksum.hexdigest()


def damaged(checkpoints: Path) -> list[str]:
    """Return what is wrong with checkpoints that have a complete name; there must be nothing."""
    return [f"{path}: {said}" for path in CheckpointFolder(checkpoints).complete() for said in verify(path)]


def kill_when(training: Training, kind: str, checkpoints: Path, delay: float) -> bool:
    """Kill at the planned instant; return False if the training ended before.

    Raises:
        RuntimeError: it neither ended nor reached that instant.
    """
    pattern = {"in a save": "rank-*", "at the manifest": "manifest.json"}.get(kind)
    while not training.is_over():
        if training.seconds >= delay and (
            pattern is None or any(any(partial.glob(pattern)) for partial in saves_of(checkpoints))
        ):
            training.kill()
            return True
        if training.seconds > LIFE_SECONDS:
            training.kill()
            raise RuntimeError(f"the training hung: no end and no instant {kind!r} in {LIFE_SECONDS:g} s")
        time.sleep(0.0005 if pattern else 0.005)
    return False
