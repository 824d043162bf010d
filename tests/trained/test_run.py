import shutil

import numpy as np
import pytest
import torch

from tide_mega.checkpoint.weights import whole_tensors
from tide_mega.errors import CheckpointError, ConfigError
from tide_mega.lab.bench.text import prepare_own_text
from tide_mega.trained.run import StoredWeights, TrainedRun


def test_a_run_folder_opens_at_its_newest_checkpoint(tiny_runs):
    run = TrainedRun.open(tiny_runs[2])
    assert (run.label, run.num_blocks, run.step, run.tokens) == ("k2", 2, 6, 6 * 8 * 32)
    assert [weights.step for weights in run.history] == [3, 6]
    assert [run.tokens_at(weights) for weights in run.history] == [3 * 8 * 32, 6 * 8 * 32]
    assert run.bins.shape == run.counts.shape == (640,)
    assert run.tokenizer.vocab_size <= 640


def test_a_checkpoint_opens_too_and_ends_the_history_there(tiny_runs):
    run = TrainedRun.open(f"early={tiny_runs[2]}/checkpoints/step-00000003")
    assert (run.label, run.step, [weights.step for weights in run.history]) == ("early", 3, [3])


def test_rows_and_chunks_are_the_stored_master_weights(tiny_runs, monkeypatch):
    stored = StoredWeights(tiny_runs[2] / "checkpoints" / "step-00000006")
    tables_VKD = dict(whole_tensors(stored.path))["master/memory.tables"]
    assert stored.shapes["memory.tables"] == (640, 2, 32)
    assert torch.equal(stored.tensor("memory.tables"), tables_VKD)
    assert torch.equal(stored.rows("memory.tables", 100, 103), tables_VKD[100:103])
    monkeypatch.setattr("tide_mega.trained.run.CHUNK_ELEMENTS", 7 * 64)
    chunks = list(stored.chunks("memory.tables"))
    assert [first for first, _ in chunks] == list(range(0, 640, 7))
    assert torch.equal(torch.cat([rows for _, rows in chunks]), tables_VKD)


def test_a_weight_that_is_not_there_is_named(tiny_runs):
    stored = StoredWeights(tiny_runs[0] / "checkpoints" / "step-00000006")
    for read in (stored.tensor, lambda name: list(stored.chunks(name))):
        with pytest.raises(
            CheckpointError, match=r"has no memory.tables: it has embedding.weight, final_norm"
        ):
            read("memory.tables")


def test_a_damaged_newest_checkpoint_is_passed_over(tiny_runs, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(tiny_runs[2], copy)
    (copy / "checkpoints" / "step-00000006" / "rank-00000.safetensors").unlink()
    assert TrainedRun.open(copy).step == 3
    with pytest.raises(ConfigError, match=r"is damaged: rank-00000\.safetensors is missing"):
        TrainedRun.open(copy / "checkpoints" / "step-00000006")


@pytest.mark.parametrize("vocab_size", [560, 700])
def test_a_dataset_that_it_was_not_trained_on_is_refused(tiny_runs, tmp_path, vocab_size):
    other = prepare_own_text(tmp_path, vocab_size)
    with pytest.raises(ConfigError, match=r"is not the dataset that .* was trained on"):
        TrainedRun.open(tiny_runs[0], data=other)


def test_a_checkpoint_about_to_be_replaced_is_not_a_second_one(tiny_runs, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(tiny_runs[2], copy)
    newer = copy / "checkpoints" / "step-00000003"
    shutil.copytree(newer, newer.with_suffix(".replaced"))
    assert [weights.path for weights in TrainedRun.open(copy).history] == [
        newer,
        copy / "checkpoints" / "step-00000006",
    ]


def test_what_is_no_run_or_has_no_dataset_is_said(tiny_runs, tiny_data, tmp_path):
    with pytest.raises(ConfigError, match="is not a run folder"):
        TrainedRun.open(tmp_path)
    with pytest.raises(ConfigError, match="say where it lies with data="):
        TrainedRun.open(tiny_runs[0], data=tmp_path)
    assert np.array_equal(
        TrainedRun.open(tiny_runs[0], data=tiny_data).bins, TrainedRun.open(tiny_runs[0]).bins
    )
