"""Saved at one topology, loaded at another: the same numbers, and the same next step."""

from dataclasses import replace

import pytest
import torch

from tests.support.checkpoints import (
    TOPOLOGIES,
    config_at,
    differing_from_rounded_masters,
    resume_and_save,
    step_after_resuming,
    stored,
)
from tests.support.runs import train_here
from tests.support.slow import quick_and_slow
from tide_mega.checkpoint.folder import CheckpointFolder
from tide_mega.checkpoint.weights import shapes
from tide_mega.parallel.groups import World
from tide_mega.training.trainer import Trainer

QUICK = [("dp2", "tp2 sp"), ("dp2 zero2 owners", "single"), ("single", "pp2 vpp2")]
CORE = ("single", "tp2 sp", "dp2 zero2 owners", "pp2 vpp2", "zero3 dp2", "tp2 dp2 owners")
"""Each loads what every other of them saved."""
PAIRS = [
    *((saved, loaded) for saved in CORE for loaded in CORE if saved != loaded),
    *(pair for name in TOPOLOGIES if name not in CORE for pair in ((name, "single"), ("single", name))),
    *(("dp2", "tp2 sp"), ("pp2", "zero3 dp2"), ("zero3 dp2", "pp2"), ("pp2 vpp2", "dp2")),
    *(("tp2 dp2 zero3", "tp2 sp"), ("dp2", "tp2 dp2 zero3")),
]


@pytest.fixture(scope="module")
def saved_at(pools, tiny_data, tmp_path_factory):
    """Return the root of a run that a topology saved after three steps, and its own next step."""
    runs = {}

    def saved(name):
        if name not in runs:
            root, pool = tmp_path_factory.mktemp("saved"), pools(TOPOLOGIES[name].world)
            pool.run(train_here, config_at(name, tiny_data, root, "trainer.max_steps=3"))
            runs[name] = root, pool.run(step_after_resuming, config_at(name, tiny_data, root))[-1]
        return runs[name]

    return saved


def assert_resharded(pools, tiny_data, root, loaded, elsewhere):
    pool = pools(TOPOLOGIES[loaded].world)
    before = stored(root / "tiny" / "checkpoints" / "step-00000003")
    (said, *_) = pool.run(resume_and_save, config_at(loaded, tiny_data, root), elsewhere)
    after = stored(elsewhere / "step-00000003")
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert torch.equal(values, after[name]), name
    assert any(text.startswith("resharded from") for text in said)
    return pool.run(step_after_resuming, config_at(loaded, tiny_data, root))


@pytest.mark.parametrize(("saved", "loaded"), quick_and_slow(QUICK, PAIRS))
def test_another_topology_goes_on_with_the_same_numbers(pools, tiny_data, tmp_path, saved_at, saved, loaded):
    root, expected = saved_at(saved)
    (*_, actual) = assert_resharded(pools, tiny_data, root, loaded, tmp_path / "elsewhere")
    assert actual[0] == expected[0] == 3
    assert actual[1] == pytest.approx(expected[1], rel=1e-6)
    assert actual[2] == pytest.approx(expected[2], rel=1e-5)


def test_everything_is_stored_once_and_whole(saved_at):
    # Tied embeddings have one name, and the tables are one tensor, whoever saved them.
    by_topology = [shapes(saved_at(name)[0] / "tiny/checkpoints/step-00000003") for name in ("pp2", "tp2 sp")]
    assert by_topology[0] == by_topology[1]
    names = by_topology[0]
    assert names["master/memory.tables"] == names["exp_avg_sq/memory.tables"] == (640, 2, 32)
    assert names["master/embedding.weight"] == (640, 32)
    assert "master/output.weight" not in names
    assert len([name for name in names if name.startswith("master/layers.")]) == 4 * 10
    assert len(names) == 3 * (4 * 10 + 4)


@pytest.mark.slow
@pytest.mark.parametrize("loaded", ["dp2", "tp2 sp"])
def test_bf16_parameters_are_the_rounded_masters(pools, tiny_data, tmp_path, loaded):
    bf16 = ("trainer.precision=bf16", "trainer.max_steps=3")
    pools(2).run(train_here, config_at("dp2 zero2 owners", tiny_data, tmp_path, *bf16))
    config = config_at(loaded, tiny_data, tmp_path, *bf16)
    assert pools(2).run(differing_from_rounded_masters, config) == [[], []]


def train_on_and_go_back(config):
    """Train in a pool's worker, go back to the first checkpoint, and save that again elsewhere."""
    trainer = Trainer(config, World.from_environment())
    try:
        trainer.run()
        state = trainer.checkpoints.restore(before=3)
        again = trainer.folder.path / "again"
        trainer.checkpoints.to = replace(trainer.checkpoints.to, local=CheckpointFolder(again))
        trainer.checkpoints.save(state)
        trainer.checkpoints.wait()
        return state.step, state.samples
    finally:
        trainer.close()


def test_a_run_can_go_back_to_an_older_one(pools, tiny_data, tmp_path):
    config = config_at("dp2 zero2 owners", tiny_data, tmp_path, "checkpoint.every=2", "trainer.max_steps=4")
    assert pools(2).run(train_on_and_go_back, config) == [(2, 16), (2, 16)]
    before = stored(tmp_path / "tiny" / "checkpoints" / "step-00000002")
    after = stored(tmp_path / "tiny" / "again" / "step-00000002")
    assert all(torch.equal(before[name], after[name]) for name in before)
