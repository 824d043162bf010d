"""An evaluation from its options: checkpoints one after the other, each on every task, kept as it goes."""

import logging
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from tide_mega.checkpoint.manifest import Manifest
from tide_mega.config.errors import refuse
from tide_mega.config.schema import ParallelConfig
from tide_mega.config.shape_rules import check_parallel
from tide_mega.data.atomic import sha256_of
from tide_mega.evaluation import harness
from tide_mega.evaluation.compare import compare
from tide_mega.evaluation.errors import EvaluationError
from tide_mega.evaluation.local import find_files
from tide_mega.evaluation.options import EvaluateOptions, check
from tide_mega.evaluation.output import write_all
from tide_mega.evaluation.replicas import Replicas
from tide_mega.evaluation.requests import TextScorer
from tide_mega.evaluation.results import FILE, SCORING, Comparison, Key, Measured, Result, Stored, read
from tide_mega.evaluation.scorer import ReplicaScorer
from tide_mega.parallel.device import Device
from tide_mega.parallel.groups import make_host_group
from tide_mega.trained.model import TrainedModel
from tide_mega.trained.run import TrainedRun, open_runs

log = logging.getLogger(__name__)

WAIT_MINUTES = 48 * 60.0
"""The others wait so long for rank 0, which downloads tasks, builds requests and computes standard errors."""


def evaluate(options: EvaluateOptions, device: Device) -> Comparison | None:
    """Evaluate checkpoints; collective over all processes, and torch.distributed is up.

    Writes zero_shot.json after every task, and at the end text, CSV and picture beside it. What the JSON already
    has is not computed again unless `fresh`.

    Returns:
        The comparison on rank 0, None elsewhere.

    Raises:
        ConfigError: an option that cannot be meant, a run that cannot be opened, a damaged local file.
        EvaluationError: a process failed, none of the tasks can be had, or `out` has something else.
    """
    check(options)
    runs = open_runs(options.run, options.data)
    for run in runs:
        _check_topology(run, options)
    host = make_host_group(WAIT_MINUTES)
    with ExitStack() as stack:
        book: _Book | None = None

        def prepare() -> list[bool]:
            nonlocal book
            book = _Book.open(options, runs, stack)
            return [bool(book.missing(i)) for i in range(len(runs))]

        for i, needed in enumerate(_from_rank_0(host, prepare)):
            if needed:
                _evaluate_run(options, device, host, runs[i], i, book)
                device.free_memory()  # only now has every reference to the model ended
        comparison = None if book is None else book.finish()
    dist.destroy_process_group(host)
    return comparison


def _evaluate_run(
    options: EvaluateOptions,
    device: Device,
    host: ProcessGroup,
    run: TrainedRun,
    index: int,
    book: "_Book | None",
) -> None:
    parallel = ParallelConfig(tensor=options.tensor, pipeline=options.pipeline)
    model = TrainedModel(run, device, precision=options.precision, parallel=parallel)
    replicas = Replicas(ReplicaScorer(model, options.batch), host)
    if book is None:
        replicas.serve()
    else:
        with replicas.leading():
            scorer = TextScorer(replicas, run.tokenizer)
            for task in book.missing(index):
                book.measure(index, task, scorer)


@dataclass
class _Book:
    """Rank 0's: tasks, and results kept in the file."""

    options: EvaluateOptions
    runs: list[TrainedRun]
    tasks: harness.Tasks
    absent: dict[str, str]
    sources: dict[str, str]
    """Of each task, as in `Key`."""
    version: str
    stored: Stored
    done: set[Key] = field(default_factory=set)
    """Of this evaluation, or found in the file."""

    @classmethod
    def open(cls, options: EvaluateOptions, runs: list[TrainedRun], stack: ExitStack) -> "_Book":
        version = f"{harness.require()}, scoring {SCORING}"
        if options.local is None:
            tasks, absent = harness.load_from_hub(options.tasks)
            sources = dict.fromkeys(tasks.names, "hub")
        else:
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
        path = _folder(options, runs) / FILE
        book = cls(options, runs, tasks, absent, sources, version, read(path) if path.exists() else Stored())
        if not options.fresh:
            book.done = set(book.stored.results)
        return book

    def key(self, index: int, task: str) -> Key:
        save = Manifest.read(self.runs[index].weights.path).save_id
        options = self.options
        return Key(save, task, self.sources[task], options.limit, options.precision, self.version)

    def missing(self, index: int) -> list[str]:
        """Tasks of a run that are still to be computed."""
        return [task for task in self.tasks.names if self.key(index, task) not in self.done]

    def measure(self, index: int, task: str, scorer: TextScorer) -> None:
        """Compute a task and keep its result."""
        run, started = self.runs[index], time.monotonic()
        log.info("%s, %s ...", run.label, task)
        measured = self.tasks.measure(task, scorer, self.options.limit)
        key = self.key(index, task)
        where = str(run.weights.path)
        self.stored.results[key] = Result(
            key, run.label, where, run.step, run.tokens, run.num_blocks, measured
        )
        self.done.add(key)
        self.stored.write(_folder(self.options, self.runs) / FILE)
        log.info("%s, %s: %s (%.0f s)", run.label, task, _said(measured), time.monotonic() - started)

    def finish(self) -> Comparison:
        """Compare, write everything."""
        rows = [
            [self.stored.results[self.key(index, task)] for task in self.tasks.names]
            for index in range(len(self.runs))
        ]
        labels = [run.label for run in self.runs]
        comparison = compare(rows, labels, self.absent, self.options.metric)
        self.stored.comparison = comparison
        folder = _folder(self.options, self.runs)
        self.stored.write(folder / FILE)
        write_all(comparison, folder)
        return comparison


def _folder(options: EvaluateOptions, runs: list[TrainedRun]) -> Path:
    return Path(options.out) if options.out is not None else runs[-1].folder / "evaluation"


def _said(measured: Measured) -> str:
    parts = []
    for name, score in measured.scores.items():
        error = "" if score.stderr is None else f" ± {score.stderr:.4g}"
        parts.append(f"{name} {score.value:.4g}{error}")
    return f"{', '.join(parts)} on {measured.examples:,} examples"


def _check_topology(run: TrainedRun, options: EvaluateOptions) -> None:
    parallel = ParallelConfig(tensor=options.tensor, pipeline=options.pipeline)
    check_parallel(replace(run.config, parallel=parallel))
    shards, world = options.tensor * options.pipeline, dist.get_world_size()
    if world % shards:
        key, value = ("tensor", options.tensor) if options.tensor > 1 else ("pipeline", options.pipeline)
        why = f"with tensor x pipeline = {shards} does not divide the {world} process(es) of the job"
        refuse(key, value, why, f"start them with torchrun --nproc-per-node={shards}, or a multiple")


def _from_rank_0(host: ProcessGroup, make: Callable[[], Any]) -> Any:
    """Return rank 0's value everywhere; where it raises, all do.

    Raises:
        EvaluationError: elsewhere than on rank 0, which raises the error itself.
    """
    if host.size() == 1:
        return make()
    box: list[Any] = [None]
    if host.rank() == 0:
        try:
            box = [(make(), None)]
        except Exception as error:
            dist.broadcast_object_list([(None, f"{error}")], src=0, group=host)
            raise
    dist.broadcast_object_list(box, src=0, group=host)
    value, failure = box[0]
    if failure is not None:
        raise EvaluationError(failure)
    return value
