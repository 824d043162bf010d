"""Whole small trainings in every kind of topology: evaluation between steps, checkpoints, kill and resume."""

from dataclasses import dataclass

import pytest

from tests.support.runs import curve, tiny, train_here, train_until
from tests.support.slow import quick_and_slow

BASE = ("model.num_layers=4", "trainer.eval_sequences=9")
"""9 held-out sequences in microbatches of 2: the last is short, and of two replicas the second has none left."""


@dataclass(frozen=True)
class Topology:
    world: int
    overrides: tuple[str, ...]
    kinds: frozenset[str] = frozenset()
    """Traffic that must be counted."""


PIPELINE = frozenset({"tokens", "rows", "row gradients"})
OWNERS = frozenset({"ids", "rows", "row gradients"})
TOPOLOGIES = {
    "pipeline": Topology(2, ("parallel.pipeline=2",), PIPELINE),
    "interleaved": Topology(2, ("parallel.pipeline=2", "parallel.virtual_pipeline=2"), PIPELINE),
    "owners": Topology(2, ("memory.owners=tensor_data",), OWNERS),
    "owners, exchange ahead": Topology(
        2, ("memory.owners=tensor_data", "memory.exchange_ahead=true"), OWNERS
    ),
    "owners, windows, ZeRO-2": Topology(
        2, ("memory.owners=tensor_data", "memory.window=1", "parallel.zero_stage=2"), OWNERS
    ),
    "tensor, owners": Topology(
        2,
        ("parallel.tensor=2", "parallel.sequence_parallel=true", "memory.owners=tensor_data"),
        OWNERS | {"tokens"},
    ),
    "windows": Topology(1, ("memory.window=2",)),
    "ahead": Topology(2, ("memory.exchange_ahead=true",)),
    "ZeRO-3": Topology(2, ("parallel.zero_stage=3",)),
    "pipeline, two replicas": Topology(4, ("parallel.pipeline=2", "parallel.recompute=full"), PIPELINE),
    "pipeline, two replicas, owners ahead": Topology(
        4,
        ("parallel.pipeline=2", "memory.owners=tensor_data", "memory.exchange_ahead=true"),
        PIPELINE | OWNERS,
    ),
}


def train(pools, tiny_data, root, topology, *overrides):
    config = tiny(tiny_data, root, *BASE, *topology.overrides, *overrides, world_size=topology.world)
    assert pools(topology.world).run(train_here, config) == [6] * topology.world
    return curve(root / "tiny" / "metrics.jsonl")


@pytest.fixture(scope="module")
def alone(pools, tiny_data, tmp_path_factory):
    """What one process logs."""
    return train(pools, tiny_data, tmp_path_factory.mktemp("alone"), Topology(1, ()))


def nearly(value, rel):
    return value if value is None else pytest.approx(value, rel=rel)


def assert_close(value, wanted, rel):
    """Compare records, lists and numbers of the same form; distances near 0 are only that."""
    if isinstance(wanted, dict):
        assert value.keys() == wanted.keys()
        for key in wanted:
            assert_close(value[key], wanted[key], rel)
    elif isinstance(wanted, list):
        assert len(value) == len(wanted)
        for item, other in zip(value, wanted, strict=True):
            assert_close(item, other, rel)
    else:
        assert value == (pytest.approx(wanted, rel=rel, abs=1e-6) if isinstance(wanted, float) else wanted)


def assert_same_curve(records, expected):
    assert [(r["kind"], r["step"]) for r in records] == [(r["kind"], r["step"]) for r in expected]
    for record, wanted in zip(records, expected, strict=True):
        if record["kind"] in ("live", "weights"):
            assert_close(record, wanted, 1e-4)
            continue
        assert record["loss"] == nearly(wanted["loss"], 1e-5)
        assert record["null_weight_by_layer"] == nearly(wanted["null_weight_by_layer"], 1e-4)
        if record["kind"] == "train":
            assert record["z_loss"] == nearly(wanted["z_loss"], 1e-5)
            assert record["grad_norm"] == nearly(wanted["grad_norm"], 1e-4)
            assert record["grad_norm_tables"] == nearly(wanted["grad_norm_tables"], 1e-4)
            continue
        assert record["count_by_bin"] == wanted["count_by_bin"]
        for slot, loss in wanted["loss_by_bin"].items():
            assert record["loss_by_bin"][slot] == nearly(loss, 1e-5)
        for layers, by_bin in wanted["null_weight_by_bin"].items():
            for slot, weight in by_bin.items():
                assert record["null_weight_by_bin"][layers][slot] == nearly(weight, 1e-4)


def assert_counted(records, kinds):
    for record in records:
        if record["kind"] == "train":
            moved = {kind: both["sent"] + both["received"] for kind, both in record["traffic"].items()}
            assert kinds <= moved.keys()
            assert all(moved[kind] > 0 for kind in kinds)


@pytest.mark.parametrize("name", quick_and_slow(["pipeline", "owners"], TOPOLOGIES))
def test_a_topology_has_the_curve_of_one_process_and_resumes_to_the_last_bit(
    pools, tiny_data, tmp_path, alone, name
):
    topology = TOPOLOGIES[name]
    whole = train(pools, tiny_data, tmp_path / "whole", topology)
    assert_same_curve(whole, alone)
    assert_counted(whole, topology.kinds)
    config = tiny(tiny_data, tmp_path / "broken", *BASE, *topology.overrides, world_size=topology.world)
    assert pools(topology.world).run(train_until, config, 5) == [5] * topology.world
    resumed = train(pools, tiny_data, tmp_path / "broken", topology)
    for record, wanted in zip(resumed, whole, strict=True):
        # The sums before the checkpoint were over ranks; those after it begin with one number.
        for key in ("loss", "z_loss"):
            if key in wanted and wanted["kind"] != "live":
                assert record.pop(key) == pytest.approx(wanted.pop(key), rel=1e-13)
        for side in (record, wanted):
            side.pop("traffic", None)
        assert record == wanted
