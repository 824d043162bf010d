"""What a session keeps, frees and waits for."""

import weakref
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")

from tide_mega.evaluation import harness, session
from tide_mega.evaluation.results import read
from tide_mega.evaluation.session import evaluate
from tide_mega.parallel.device import Device


def test_results_of_an_earlier_scoring_are_kept_and_computed_again(options, alone):
    one = replace(options, run=options.run[:1], tasks=["arc_easy"])
    evaluate(one, alone)
    path = Path(options.out) / "zero_shot.json"
    (key,) = read(path).results
    assert key.harness == f"{harness.require()}, scoring 2"
    path.write_text(path.read_text().replace(", scoring 2", ""))
    (old,) = read(path).results
    assert old == replace(key, harness=harness.require())
    evaluate(one, alone)
    assert set(read(path).results) == {old, key}


def test_memory_is_freed_when_the_model_is_no_longer_held(options, alone, monkeypatch):
    models, alive = [], []
    build, free = session.TrainedModel, Device.free_memory

    def kept(*args, **kwargs):
        model = build(*args, **kwargs)
        models.append(weakref.ref(model))
        return model

    def watched(device):
        free(device)
        alive.append(models[-1]() is not None)

    monkeypatch.setattr(session, "TrainedModel", kept)
    monkeypatch.setattr(Device, "free_memory", watched)
    evaluate(replace(options, tasks=["lambada_openai"]), alone)
    assert len(models) == 2 and alive == [False, False]


def test_processes_wait_many_hours_for_the_first(options, alone, monkeypatch):
    waits = []
    plain = session.make_host_group

    def make(*args):
        group = plain(*args)
        waits.append(group._get_backend(torch.device("cpu")).options._timeout)
        return group

    monkeypatch.setattr(session, "make_host_group", make)
    evaluate(replace(options, run=options.run[:1], tasks=["lambada_openai"]), alone)
    assert len(waits) == 1 and waits[0] >= timedelta(hours=24)
