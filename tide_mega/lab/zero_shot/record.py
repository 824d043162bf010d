"""Rank 0's part of an evaluation: loads the tasks and stores each result as soon as it is there."""

import logging
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tide_mega.checkpoint.storage import Manifest
from tide_mega.errors import EvaluationError, refuse
from tide_mega.files import sha256_of
from tide_mega.jobs.lock import FolderLock
from tide_mega.lab.zero_shot import harness
from tide_mega.lab.zero_shot.compare import compare
from tide_mega.lab.zero_shot.harness import FILES, find_files
from tide_mega.lab.zero_shot.options import TITLES, EvaluateOptions
from tide_mega.lab.zero_shot.output import write_all
from tide_mega.lab.zero_shot.replicas import TextScorer
from tide_mega.lab.zero_shot.results import FILE, SCORING, Comparison, Key, Measured, Result, Stored, read
from tide_mega.trained.run import TrainedRun

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Save:
    """A checkpoint's data for its results, read up front because a live training may remove the checkpoint."""

    save_id: str
    step: int
    tokens: int

    @classmethod
    def of(cls, run: TrainedRun) -> "_Save":
        return cls(Manifest.read(run.weights.path).save_id, run.step, run.tokens)


@dataclass
class ResultLog:
    """Tasks and, for each run, which are done and which are missing."""

    options: EvaluateOptions
    runs: list[TrainedRun]
    saves: list[_Save]
    """Of the runs."""
    folder: Path
    """Of the results."""
    tasks: harness.Tasks
    absent: dict[str, str]
    sources: dict[str, str]
    """Of each task, as in `Key`."""
    version: str
    stored: Stored
    done: set[Key] = field(default_factory=set)
    """Done in this evaluation, or found in the file."""

    @classmethod
    def open(cls, options: EvaluateOptions, runs: list[TrainedRun], stack: ExitStack) -> "ResultLog":
        """Load the tasks and the results in `out`; `stack` releases the tasks' data and `out`.

        Raises:
            ConfigError: an unknown task, a damaged local file, or an `out` that cannot be written.
            EvaluationError: no task is available, or the file in `out` is something else.
            FolderTakenError: another process is at work in `out`.
        """
        version = f"{harness.require()}, scoring {SCORING}"
        saves = [_Save.of(run) for run in runs]
        if options.local is None:
            tasks, absent = harness.load_from_hub(options.tasks)
            sources = dict.fromkeys(tasks.names, "hub")
        else:
            harness.check_names([task for task in options.tasks if task not in {*FILES, *TITLES}])
            files, absent = find_files(Path(options.local), options.tasks)
            cache = stack.enter_context(tempfile.TemporaryDirectory(prefix="tide-datasets-"))
            tasks = harness.load_local(files, Path(cache))
            sources = {name: sha256_of(path) for name, path in files.items()}
        for name, reason in absent.items():
            log.warning("%s is not evaluated: %s", name, reason)
        if not tasks.names:
            raise EvaluationError(
                "no task can be evaluated: " + "; ".join(f"{n} {why}" for n, why in absent.items())
            )
        folder = Path(options.out) if options.out is not None else runs[-1].folder / "evaluation"
        stack.enter_context(FolderLock(folder, "an evaluation", key="out"))
        stored = _stored_in(folder)
        book = cls(options, runs, saves, folder, tasks, absent, sources, version, stored)
        if not options.fresh:
            book.done = set(book.stored.results)
        return book

    def key(self, index: int, task: str) -> Key:
        """Return the key of a run's result on a task."""
        save, options = self.saves[index].save_id, self.options
        return Key(save, task, self.sources[task], options.limit, options.precision, self.version)

    def missing(self, index: int) -> list[str]:
        """Tasks of a run that are still to be computed."""
        return [task for task in self.tasks.names if self.key(index, task) not in self.done]

    def measure(self, index: int, task: str, scorer: TextScorer) -> None:
        """Compute a task and store its result."""
        run, save, started = self.runs[index], self.saves[index], time.monotonic()
        log.info("%s, %s ...", run.label, task)
        measured = self.tasks.measure(task, scorer, self.options.limit)
        key = self.key(index, task)
        where = str(run.weights.path)
        self.stored.results[key] = Result(
            key, run.label, where, save.step, save.tokens, run.num_blocks, measured
        )
        self.done.add(key)
        self.stored.write(self.folder / FILE)
        log.info("%s, %s: %s (%.0f s)", run.label, task, _said(measured), time.monotonic() - started)

    def finish(self) -> Comparison:
        """Compare the runs and write everything."""
        rows = [
            [self.stored.results[self.key(index, task)] for task in self.tasks.names]
            for index in range(len(self.runs))
        ]
        labels = [run.label for run in self.runs]
        comparison = compare(rows, labels, self.absent, self.options.metric)
        self.stored.comparison = comparison
        self.stored.write(self.folder / FILE)
        write_all(comparison, self.folder)
        return comparison


def _stored_in(folder: Path) -> Stored:
    """Return the results in a folder, after rewriting the file: fails before computing what it could not store.

    Raises:
        ConfigError: nothing can be written there.
        EvaluationError: the file is something else.
    """
    path = folder / FILE
    try:
        stored = read(path) if path.exists() else Stored()
        stored.write(path)
    except OSError as error:
        why = f"cannot take {FILE} ({error.strerror or error})"
        refuse("out", folder, why, "give a folder that can be written, out=<folder>")
    return stored


def _said(measured: Measured) -> str:
    parts = []
    for name, score in measured.scores.items():
        error = "" if score.stderr is None else f" ± {score.stderr:.4g}"
        parts.append(f"{name} {score.value:.4g}{error}")
    return f"{', '.join(parts)} on {measured.examples:,} examples"
