"""What a checkpoint says it is, and who may go on from it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.checkpoints import IDENTITY, write_step
from tide_mega.checkpoint.state import Identity, SavedState, TrainingState
from tide_mega.config.hydra_door import compose
from tide_mega.errors import CheckpointError, ConfigError


def identity(*overrides, data="d", bins=b"b", world_size=8):
    config = compose(
        ["experiment=demo_tide", "trainer.global_batch_size=64", *overrides], world_size=world_size
    )
    return Identity.of(config, data, bins, world_size)


def test_steps_count_what_they_take_and_a_rollback_goes_on_in_the_data():
    state = TrainingState()
    state.take(8, 32)
    saved = replace(state, extra={"kept": 1})
    state.take(8, 32)
    state.take(3, 32)
    assert (state.step, state.samples, state.batches) == (3, 19, 3)
    assert state.tokens == state.consumed_tokens == 19 * 32
    state.go_back_to(saved)
    assert (state.step, state.tokens, state.extra) == (1, 8 * 32, {"kept": 1})
    assert (state.samples, state.consumed_tokens, state.batches) == (19, 19 * 32, 3)


def test_a_state_without_counts_of_tokens_is_of_one_batch_size():
    assert TrainingState(step=7, samples=56).count_tokens(32) == TrainingState(
        step=7, samples=56, tokens=56 * 32, consumed_tokens=56 * 32, batches=7
    )
    counted = TrainingState(step=7, samples=0, tokens=5, consumed_tokens=9, batches=8)
    assert replace(counted).count_tokens(32) == counted


def test_what_was_saved_is_read(tmp_path):
    progress = TrainingState(7, 56, 1.5, 0.25, 1024, "run-id", {"rolled_back": 2})
    saved = SavedState("id", progress, 6, identity("memory.owners=tensor_data"))
    (tmp_path / "state.json").write_text(saved.dump())
    assert SavedState.read(tmp_path) == saved


def test_topology_and_versions_may_change():
    one = identity(world_size=1)
    other = identity("parallel=tp2", "parallel.zero_stage=2", "memory.owners=tensor_data")
    assert one.topology != other.topology
    assert other.topology | {"processes": 8, "tensor": 2, "data": 4, "table_owners": 8} == other.topology
    one.check(replace(other, versions={"torch": "0"}), Path("c"))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (identity("memory=k8"), r"another model, with memory\.num_blocks=8 \(now 4\): give these the values"),
        (identity("model.num_layers=3"), r"num_layers=3 \(now"),
        (identity(data="e"), "while training on other data than"),
        (identity(bins=b"c"), "with other frequency deciles than"),
    ],
)
def test_another_run_is_refused_in_a_sentence(other, said):
    with pytest.raises(ConfigError, match=said):
        identity().check(other, Path("c"))


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"save_id": "x", "progress": {"step": 1, "new": 2}}'])
def test_a_state_of_something_else_is_an_error(tmp_path, content):
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
        SavedState.read(tmp_path)


def test_the_file_names_everything(tmp_path):
    write_step(tmp_path, 4)
    content = json.loads((tmp_path / "step-00000004" / "state.json").read_text())
    assert set(content) == {"save_id", "progress", "updates", "identity", "format"}
    assert content["identity"]["model"] == IDENTITY.model
    assert content["progress"]["step"] == content["updates"] == 4
