"""Runs an evaluation from its options: one checkpoint after the other, each on every task."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from tide_mega.config.schema import ParallelConfig
from tide_mega.config.shape_rules import check_parallel
from tide_mega.errors import ConfigError, EvaluationError, refuse
from tide_mega.lab.zero_shot.options import EvaluateOptions, check
from tide_mega.lab.zero_shot.record import ResultLog
from tide_mega.lab.zero_shot.replicas import Replicas, TextScorer
from tide_mega.lab.zero_shot.results import Comparison
from tide_mega.lab.zero_shot.scorer import ReplicaScorer
from tide_mega.parallel.device import Device
from tide_mega.parallel.groups import make_host_group
from tide_mega.trained.model import TrainedModel
from tide_mega.trained.run import TrainedRun, open_runs

WAIT_MINUTES = 48 * 60.0
"""Timeout of the other ranks, while rank 0 downloads tasks, builds requests and computes standard errors."""


def evaluate(options: EvaluateOptions, device: Device) -> Comparison | None:
    """Evaluate checkpoints; collective over all processes of an initialised torch.distributed.

    Writes zero_shot.json after every task, and at the end text, CSV and figure beside it. Results already in the
    JSON are not computed again unless `fresh`.

    Returns:
        The comparison on rank 0, None elsewhere.

    Raises:
        ConfigError: an invalid option, a run that cannot be opened or that not every process sees, an unknown
            task, a damaged local file, or an `out` that cannot be written.
        EvaluationError: a process failed, a model's answers are not finite, no task is available, or the file in
            `out` is something else.
    """
    check(options)
    host = make_host_group(WAIT_MINUTES)
    runs = _open_runs(options, host)
    for run in runs:
        _check_topology(run, options)
    with ExitStack() as stack:
        book: ResultLog | None = None

        def prepare() -> list[bool]:
            nonlocal book
            book = ResultLog.open(options, runs, stack)
            return [bool(book.missing(i)) for i in range(len(runs))]

        for i, needed in enumerate(_from_rank_0(host, prepare)):
            if needed:
                _evaluate_run(options, device, host, runs[i], i, book)
                device.free_memory()  # only now is every reference to the model gone
        comparison = None if book is None else book.finish()
    dist.destroy_process_group(host)
    return comparison


def _open_runs(options: EvaluateOptions, host: ProcessGroup) -> list[TrainedRun]:
    """Open rank 0's choice of checkpoints on all processes, since a training may save a newer one meanwhile.

    Raises:
        ConfigError: a run cannot be opened, or is not visible to this process.
    """
    runs: list[TrainedRun] = _from_rank_0(host, lambda: open_runs(options.run, options.data))
    for folder in (folder for run in runs for folder in (run.weights.path, run.data)):
        if not folder.is_dir():
            raise ConfigError(
                f"{folder}, which rank 0 has opened, is not there for rank {host.rank()}: keep runs and their "
                "dataset where all processes see them."
            )
    return runs


def _evaluate_run(
    options: EvaluateOptions,
    device: Device,
    host: ProcessGroup,
    run: TrainedRun,
    index: int,
    book: ResultLog | None,
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


def _check_topology(run: TrainedRun, options: EvaluateOptions) -> None:
    parallel = ParallelConfig(tensor=options.tensor, pipeline=options.pipeline)
    check_parallel(replace(run.config, parallel=parallel))
    shards, world = options.tensor * options.pipeline, dist.get_world_size()
    if world % shards:
        key, value = ("tensor", options.tensor) if options.tensor > 1 else ("pipeline", options.pipeline)
        why = f"with tensor x pipeline = {shards} does not divide the {world} process(es) of the job"
        refuse(key, value, why, f"start them with torchrun --nproc-per-node={shards}, or a multiple")


def _from_rank_0(host: ProcessGroup, make: Callable[[], Any]) -> Any:
    """Return rank 0's value on all ranks; if it raises, all do.

    Raises:
        EvaluationError: on the other ranks; rank 0 raises the error itself.
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
