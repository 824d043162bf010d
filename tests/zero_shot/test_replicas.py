"""Several processes: replicas, tensor shards, pipeline stages, and failures that must end all processes."""

import math

import pytest
import torch.distributed as dist

from tests.support.slow import quick_and_slow
from tests.zero_shot.texts import documents, pairs
from tests.zero_shot.tiny import text_scorer
from tide_mega.config.schema import ParallelConfig
from tide_mega.errors import BrokenReplicaError, EvaluationError
from tide_mega.lab.parity.pool import WorkerError
from tide_mega.parallel.device import choose_device
from tide_mega.trained.run import TrainedRun

GENERATE = [("import os", {"max_gen_toks": 6}), ("", {"max_gen_toks": 4}), ("def value", {"max_gen_toks": 9})]


def everything(scorer):
    return scorer.loglikelihood(pairs()), scorer.loglikelihood_rolling(documents()), scorer.generate(GENERATE)


def ask_all(path, sizes):
    """In every process of a pool: rank 0's answers."""
    parallel = ParallelConfig(**sizes)
    scorer = text_scorer(TrainedRun.open(path), choose_device("cpu", 0), batch=3, parallel=parallel)
    replicas = scorer.replicas
    answers = None
    if replicas.host.rank():
        replicas.serve()
    else:
        with replicas.leading():
            answers = everything(scorer)
    dist.destroy_process_group(replicas.host)
    return answers


SIZES = [
    (2, {}),
    (2, {"tensor": 2}),
    (2, {"pipeline": 2}),
    (4, {"tensor": 2, "pipeline": 2}),
    (4, {"pipeline": 2}),
]
CASES = [(k, processes, sizes) for k in (0, 2) for processes, sizes in SIZES]
QUICK = [(0, 2, {"tensor": 2}), (2, 2, {}), (2, 2, {"pipeline": 2})]


@pytest.mark.parametrize(("k", "processes", "sizes"), quick_and_slow(QUICK, CASES))
def test_any_topology_says_what_one_process_says(tiny_runs, pools, alone, processes, sizes, k):
    run = TrainedRun.open(tiny_runs[k])
    one, rolling, texts = everything(text_scorer(run, alone, batch=3))
    first, *others = pools(processes).run(ask_all, tiny_runs[k], sizes)
    assert others == [None] * (processes - 1)
    assert [greedy for _, greedy in first[0]] == [greedy for _, greedy in one]
    assert [nats for nats, _ in first[0]] == pytest.approx([nats for nats, _ in one], abs=1e-4)
    assert first[1] == pytest.approx(rolling, abs=1e-4)
    assert first[2] == texts


def fail_on(path, sizes, rank):
    """One process fails at its work; says how each ended, unless the pool had to end them."""
    scorer = text_scorer(TrainedRun.open(path), choose_device("cpu", 0), parallel=ParallelConfig(**sizes))
    replicas = scorer.replicas
    if replicas.host.rank() == rank:

        def broken(*_):
            raise RuntimeError("planted")

        replicas.scorer.score = broken
    try:
        if replicas.host.rank():
            replicas.serve()
        else:
            with replicas.leading():
                scorer.loglikelihood(pairs())
    except BrokenReplicaError:
        raise
    except EvaluationError as error:
        return str(error)
    return "ended well"


def score_broken(path, sizes):
    """How each process ends whose model has only NaN for weights."""
    scorer = text_scorer(TrainedRun.open(path), choose_device("cpu", 0), parallel=ParallelConfig(**sizes))
    replicas = scorer.replicas
    for weight in replicas.scorer.model.stage.parameters():
        weight.fill_(math.nan)
    try:
        if replicas.host.rank():
            replicas.serve()
        else:
            with replicas.leading():
                scorer.loglikelihood([("import os", " def"), ("class", " path"), ("import", " os")])
    except EvaluationError as error:
        return type(error), str(error)
    return None


@pytest.mark.parametrize("sizes", quick_and_slow([{"pipeline": 2}], [{"pipeline": 2}, {"tensor": 2}, {}]))
def test_a_broken_checkpoint_ends_all_processes_with_one_sentence(tiny_runs, pools, sizes):
    (kind, first), (_, second) = pools(2).run(score_broken, tiny_runs[2], sizes)
    assert kind is EvaluationError and first.startswith("3 of 3 log-likelihoods of k2 (")
    assert second == f"EvaluationError: {first}"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failed_replica_ends_all_processes_with_its_message(tiny_runs, pools, rank):
    first, second = pools(2).run(fail_on, tiny_runs[0], {}, rank)
    assert first == f"rank {rank}: RuntimeError: planted"
    assert second == f"EvaluationError: {first}"


@pytest.mark.slow
def test_a_process_that_fails_within_its_replica_ends_at_once(tiny_runs, pools):
    with pytest.raises(WorkerError, match="BrokenReplicaError: rank 1: RuntimeError: planted"):
        pools(2).run(fail_on, tiny_runs[0], {"tensor": 2}, 1)


def raise_between(path):
    scorer = text_scorer(TrainedRun.open(path), choose_device("cpu", 0))
    replicas = scorer.replicas
    try:
        if replicas.host.rank():
            replicas.serve()
        else:
            with replicas.leading():
                scorer.loglikelihood(pairs()[:3])
                raise KeyError("a task's own bug")
    except (EvaluationError, KeyError) as error:
        return type(error).__name__, str(error)


@pytest.mark.slow
def test_an_error_of_the_harness_ends_those_who_serve(tiny_runs, pools):
    first, second = pools(2).run(raise_between, tiny_runs[0])
    assert first[0] == "KeyError"
    assert second == ("EvaluationError", """KeyError: "a task's own bug\"""")
