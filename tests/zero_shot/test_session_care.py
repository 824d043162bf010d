"""A session's resources: what it keeps and frees, and what it waits for."""

import shutil
import time
import weakref
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("lm_eval")

from tide_mega.errors import ConfigError, EvaluationError
from tide_mega.jobs.lock import FolderLock, FolderTakenError
from tide_mega.lab.zero_shot import harness, session
from tide_mega.lab.zero_shot.results import Stored, read
from tide_mega.lab.zero_shot.session import evaluate
from tide_mega.parallel.device import Device, choose_device


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


def test_a_folder_that_another_evaluation_writes_is_refused_untouched(options, alone):
    out = Path(options.out)
    with FolderLock(out, "an evaluation", key="out"):
        before = sorted(out.iterdir())
        with pytest.raises(FolderTakenError, match="is in use by an evaluation"):
            evaluate(replace(options, run=options.run[:1], tasks=["arc_easy"]), alone)
        assert sorted(out.iterdir()) == before
    evaluate(replace(options, run=options.run[:1], tasks=["arc_easy"]), alone)
    assert (out / "zero_shot.json").exists() and not (out / "in_use.json").exists()


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


def live_run(folder, finished, *steps):
    """As a training leaves it with checkpoints at these steps."""
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("checkpoints"))
    for step in steps:
        save(folder, finished, step)
    return folder


def save(folder, finished, step):
    name = f"checkpoints/step-{step:08d}"
    shutil.copytree(finished / name, folder / name)


def loaded_while_training(options, live, finished):
    """In every process: what it loads where the second looks at the run after the training has saved again."""
    loaded, seen = [], live / "seen"
    plain_open, plain_model = session.open_runs, session.TrainedModel

    def look(*args):
        if dist.get_rank() == 0:
            runs = plain_open(*args)
            seen.touch()
            return runs
        while not seen.exists():
            time.sleep(0.01)
        save(live, finished, 6)
        return plain_open(*args)

    def build(run, *args, **kwargs):
        loaded.append((run.label, run.step, run.weights.path.name))
        return plain_model(run, *args, **kwargs)

    with patch.object(session, "open_runs", look), patch.object(session, "TrainedModel", build):
        evaluate(options, choose_device("cpu", 0))
    return loaded


def test_all_processes_load_the_checkpoint_that_the_first_one_chose(options, pools, tiny_runs, tmp_path):
    live = live_run(tmp_path / "live", tiny_runs[2], 3)
    chosen = replace(options, run=[f"mine={live}"], tasks=["lambada_openai"])
    first, second = pools(2).run(loaded_while_training, chosen, live, tiny_runs[2])
    assert first == second == [("mine", 3, "step-00000003")]


def refused_where_not_seen(options, hidden):
    """In every process: why it ends where the second one does not see a folder."""
    plain, host = Path.is_dir, session.make_host_group(1.0)

    def is_dir(path, **kwargs):
        return plain(path, **kwargs) and not (host.rank() and str(path) == hidden)

    try:
        with patch.object(Path, "is_dir", is_dir):
            session._open_runs(options, host)
    except ConfigError as error:
        return str(error)
    finally:
        dist.destroy_process_group(host)
    return "opened"


def test_a_dataset_that_one_process_does_not_see_is_named(options, pools, tiny_data):
    first, second = pools(2).run(refused_where_not_seen, options, str(tiny_data))
    assert first == "opened"
    assert second.startswith(f"{tiny_data}, which rank 0 has opened, is not there for rank 1")


def test_a_finished_task_is_kept_when_its_checkpoint_is_removed(
    options, alone, tiny_runs, tmp_path, monkeypatch
):
    live = live_run(tmp_path / "live", tiny_runs[2], 6)
    plain = harness.Tasks.measure

    def measure(self, *args):
        measured = plain(self, *args)
        shutil.rmtree(live / "checkpoints", ignore_errors=True)
        return measured

    monkeypatch.setattr(harness.Tasks, "measure", measure)
    table = evaluate(replace(options, run=[str(live)]), alone)
    assert len(table.columns) == 3
    results = read(Path(options.out) / "zero_shot.json").results.values()
    assert [(r.key.task, r.step) for r in results] == [("arc_easy", 6), ("lambada_openai", 6)]


@pytest.mark.parametrize("where", ["file", "file/below", "taken"])
def test_an_unusable_out_is_refused_before_anything_is_computed(options, alone, tmp_path, monkeypatch, where):
    (tmp_path / "file").touch()
    (tmp_path / "taken" / "zero_shot.json").mkdir(parents=True)
    measured = []
    monkeypatch.setattr(harness.Tasks, "measure", lambda *args: measured.append(args))
    with pytest.raises(
        ConfigError, match=rf"out=/.*/{where} cannot (take zero_shot.json|be written) \(.*\): give "
    ):
        evaluate(replace(options, out=str(tmp_path / where)), alone)
    assert not measured


def test_beside_local_files_a_misspelt_task_is_refused(options, alone, monkeypatch):
    class Index:
        all_subtasks = ("arc_easy", "winogrande")

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Index)
    with pytest.raises(
        ConfigError, match=r"^tasks=arc_esay is no task of .*: the nearest name is arc_easy, and"
    ):
        evaluate(replace(options, tasks=["arc_easy", "winogrande", "arc_esay"]), alone)


def test_an_out_that_can_be_written_keeps_its_results_from_the_start(options, alone, monkeypatch):
    def broken(*_):
        raise EvaluationError("out of memory")

    one = replace(options, run=options.run[:1], tasks=["lambada_openai"])
    path = Path(options.out) / "zero_shot.json"
    with monkeypatch.context() as patched:
        patched.setattr(harness.Tasks, "measure", broken)
        with pytest.raises(EvaluationError, match="out of memory"):
            evaluate(one, alone)
        assert read(path) == Stored()
    evaluate(one, alone)
    (kept,) = read(path).results.values()
    with monkeypatch.context() as patched:
        patched.setattr(harness.Tasks, "measure", broken)
        with pytest.raises(EvaluationError, match="out of memory"):
            evaluate(replace(one, fresh=True), alone)
    assert list(read(path).results.values()) == [kept]
