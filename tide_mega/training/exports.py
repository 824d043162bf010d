"""Exports beside a run's checkpoints (`checkpoint.export_hf_every`), made while training continues.

Each export runs in a process of its own, with the command that a user would give, from a committed checkpoint. It
blocks no rank, and its failure never stops the run. Its output goes to a log file beside the exported folder.
"""

import logging
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tide_mega

log = logging.getLogger(__name__)

_SECONDS_TO_END = 30.0
"""Time that a terminated export has to remove what it has written."""


@dataclass
class _Running:
    step: int
    process: subprocess.Popen
    said: Path


class Exports:
    """The exports of a run, one at a time, on the logging rank."""

    def __init__(self, run: Path, precision: str) -> None:
        """Export checkpoints of the run folder `run` to its subfolder `hf`, in the precision of training."""
        self.run, self.precision = run.resolve(), precision
        self._wanted: set[int] = set()
        self._next: int | None = None
        self._running: _Running | None = None

    def want(self, step: int) -> None:
        """Request the export of a step; it starts once the checkpoint is committed, which must stay until then."""
        self._wanted.add(step)

    def in_use(self) -> set[int]:
        """Return the steps whose checkpoints must not be removed; callable from any thread."""
        return set(self._wanted)

    def on_written(self, step: int) -> None:
        """Queue the export of a committed checkpoint if it was requested.

        It starts as soon as no other is running; if several wait, only the newest is made.
        """
        if step not in self._wanted:
            return
        if self._next is not None:
            self._wanted.discard(self._next)
            log.warning(
                "step %d is not exported, as earlier exports took so long: %s makes it; a larger "
                "checkpoint.export_hf_every asks for fewer",
                self._next,
                self._by_hand(self._next),
            )
        self._next = step
        self.poll()

    def poll(self) -> None:
        """Poll the running export and start the queued one when it ends; call once a step."""
        if self._running is not None and self._running.process.poll() is not None:
            self._conclude(self._running)
        if self._running is None and self._next is not None:
            step, self._next = self._next, None
            try:
                self._running = self._begin(step)
            except OSError as error:
                self._wanted.discard(step)
                log.error("the export of step %d could not be begun (%s); training goes on", step, error)

    def finish(self) -> None:
        """Wait for the running export and the queued one."""
        while self._running is not None:
            log.info("waiting for the export of step %d", self._running.step)
            self._running.process.wait()
            self.poll()

    def stop(self) -> None:
        """Terminate the running export: the job may be about to be killed."""
        running, waiting = self._running, self._next
        self._running = self._next = None
        if running is not None:
            running.process.terminate()
            try:
                running.process.wait(_SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                running.process.kill()
                running.process.wait()
        for step in (waiting, running.step if running is not None else None):
            if step is not None:
                log.warning(
                    "the export of step %d ended with the run: %s makes it", step, self._by_hand(step)
                )

    def folder(self, step: int) -> Path:
        """Return the folder of a step's export."""
        return self.run / "hf" / f"step-{step:08d}"

    def _by_hand(self, step: int) -> str:
        return shlex.join(["python", *self._command(step)[1:]])

    def _command(self, step: int) -> list[str]:
        checkpoint = self.run / "checkpoints" / f"step-{step:08d}"
        words = [f"run={checkpoint}", f"out={self.folder(step)}", f"dtype={self.precision}", "overwrite=true"]
        return [sys.executable, "-m", "tide_mega.export", *words, f"name={self.run.name}"]

    def _begin(self, step: int) -> _Running:
        said = self.folder(step).with_suffix(".log")
        said.parent.mkdir(exist_ok=True)
        polite = [nice, "-n", "10"] if (nice := shutil.which("nice")) else []
        here = str(Path(tide_mega.__file__).parents[1])
        paths = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
        # No GPU: training has them all. A session of its own: Ctrl-C must reach the training process only.
        environment = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        with said.open("wb") as file:
            process = subprocess.Popen(
                [*polite, *self._command(step)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return _Running(step, process, said)

    def _conclude(self, running: _Running) -> None:
        self._running = None
        self._wanted.discard(running.step)
        if running.process.returncode == 0:
            log.info("exported step %d to %s", running.step, self.folder(running.step))
            return
        lines = running.said.read_text(encoding="utf-8", errors="replace").splitlines() or ["it said nothing"]
        log.error(
            "the export of step %d failed with status %d: %s; training goes on. %s says all, and %s makes it",
            running.step,
            running.process.returncode,
            lines[-1],
            running.said,
            self._by_hand(running.step),
        )
