"""Bringing about the faults that `faults.inject` names, each said aloud when it strikes."""

import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tide_mega.config.injection import KINDS, Injection, parse_injection
from tide_mega.data.errors import DataError
from tide_mega.model.passes import StepResult
from tide_mega.parallel.engine import Engine

log = logging.getLogger(__name__)

_SPIKE = 10.0


class Injector:
    """The faults of one rank. Without any it does nothing.

    Steps are counted by batches of data, so a batch that a rollback has passed by does not strike again, and one
    that a resumed run reads again does. `kill`, `hang` and `disk_full` leave a mark in the run folder first and
    strike once, else no restart would get past them.
    """

    def __init__(self, texts: Sequence[str], rank: int, marks: Path) -> None:
        """Take `faults.inject`, this rank, and the folder for the marks."""
        self._marks, self._rank = marks, rank
        every = [parse_injection(text) for text in texts]
        self._mine = [one for one in every if one.rank is None or one.rank == rank]
        for one in self._mine:
            log.warning("FAULT INJECTION (faults.inject): %s: %s", one.text, KINDS[one.kind])

    def before(self, batch: int) -> None:
        """Strike at the begin of the step on batch number `batch`.

        Raises:
            DataError: a bad shard was asked for.
        """
        for one in self._due("kill", batch):
            if self._is_first(one):
                os.kill(os.getpid(), signal.SIGKILL)
        for one in self._due("hang", batch):
            if self._is_first(one):
                threading.Event().wait()
        if self._due("bad_shard", batch):
            raise DataError(f"a shard cannot be read at batch {batch} (injected by faults.inject)")

    def is_slow(self, batch: int) -> bool:
        """Whether this rank is to compute longer."""
        return any(one.kind == "slow" and batch >= one.step for one in self._mine)

    def slow_down(self, batch: int) -> None:
        """Take the time that a slow rank takes longer."""
        time.sleep(sum(one.seconds for one in self._mine if one.kind == "slow" and batch >= one.step))

    def spoil(self, result: StepResult, engine: Engine, batch: int) -> StepResult:
        """Return the step's sums, and leave its gradients, as the faults due make them."""
        if self._due("nan_grad", batch):
            engine.poison_gradient()
        factor = 1.0
        if self._due("nan_loss", batch):
            factor = float("nan")
        elif self._due("spike", batch):
            factor = _SPIKE
        return result if factor == 1.0 else replace(result, loss_sum=result.loss_sum * factor)

    def is_disk_full(self, batch: int) -> bool:
        """Whether the checkpoint after batch number `batch` is to fail: the first from the fault's batch on."""
        due = [one for one in self._mine if one.kind == "disk_full" and one.step <= batch]
        self._mine = [one for one in self._mine if one not in due]
        first = [one for one in due if self._is_first(one)]
        for one in first:
            log.warning("FAULT INJECTION: %s strikes", one.text)
        return bool(first)

    def _due(self, kind: str, batch: int) -> list[Injection]:
        due = [one for one in self._mine if one.kind == kind and one.step == batch]
        for one in due:
            log.warning("FAULT INJECTION: %s strikes", one.text)
        return due

    def _is_first(self, one: Injection) -> bool:
        mark = self._marks / f"{one.text.replace(':', '-')}.rank-{self._rank}"
        if mark.exists():
            log.warning("FAULT INJECTION: %s has struck before in this run folder, and is left out", one.text)
            return False
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
        return True
