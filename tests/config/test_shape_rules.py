"""Topologies, batches and windows: what is refused, with values that would do, and what is let through."""

import re
from dataclasses import replace

import pytest

from tide_mega.config import shape_rules
from tide_mega.config.hydra_door import compose
from tide_mega.config.validate import validate
from tide_mega.errors import ConfigError

OWNERS, REPLICATED = "memory.owners=tensor_data", "memory.owners=tensor"
REFUSED = [
    # overrides, world size, words that the sentence has
    (["parallel.pipeline=5"], None, ["parallel.pipeline=5", "model.num_layers=24", "12 or 24"]),
    (["parallel.pipeline=48"], None, ["parallel.pipeline=48", "model.num_layers=24", "12 or 24"]),
    (["parallel.pipeline=5", "parallel.virtual_pipeline=4"], None, ["parallel.pipeline=5", "use 2, 3 or 6."]),
    (
        ["parallel.pipeline=5", "parallel.virtual_pipeline=7"],
        None,
        ["parallel.pipeline=5", "12 or 24 with virtual_pipeline=1"],
    ),
    (["parallel.virtual_pipeline=2"], None, ["parallel.virtual_pipeline=2", "pipeline=1", "pipeline=2"]),
    (
        ["parallel=pp2_interleaved", "parallel.virtual_pipeline=5"],
        None,
        ["parallel.virtual_pipeline=5", "12 layers", "num_layers=24", "use 1, 2, 3, 4, 6 or 12"],
    ),
    (["parallel.zero_stage=0"], None, ["parallel.zero_stage=0", "Adam's step twice", "costs nothing"]),
    (["parallel.zero_stage=4"], None, ["parallel.zero_stage=4", "use 1, 2 or 3"]),
    (["parallel=pp2", "parallel.zero_stage=-1"], None, ["parallel.zero_stage=-1", "use 1 or 2."]),
    (
        ["parallel=pp2", "parallel.zero_stage=3"],
        None,
        ["parallel.zero_stage=3", "parallel.pipeline=2", "hangs", "use 1 or 2"],
    ),
    (
        ["parallel=zero3", "memory=k8", OWNERS],
        None,
        ["parallel.zero_stage=3", OWNERS, "clip factor", "use 1 or 2"],
    ),
    (["parallel=tp2_pp2"], 6, ["parallel.tensor=2", "pipeline=2", "6 process", "multiple of 4"]),
    (
        ["parallel=pp2_interleaved", "trainer.global_batch_size=40"],
        2,
        [
            "trainer.global_batch_size=40",
            "parallel.pipeline=2",
            "interleaved",
            "32 or 48",
            "virtual_pipeline=1",
        ],
    ),
    (
        ["parallel=pp2_interleaved", "trainer.global_batch_size=8"],
        2,
        ["trainer.global_batch_size=8", "interleaved", "use 16, or"],
    ),
    (["memory.window=3"], 1, ["memory.window=3", "64 microbatch", "2, 4 or null"]),
    (["memory.window=65"], 1, ["memory.window=65", "64 microbatch", "64 or null"]),
    (["memory.window=2"], 64, ["memory.window=2", "1 microbatch", "1 or null"]),
    (
        ["parallel=pp2_interleaved", "memory.window=1"],
        2,
        ["memory.window=1", "parallel.pipeline=2", "interleaved", "use 2 or null"],
    ),
    (
        ["parallel=pp2_interleaved", "parallel.pipeline=4", "memory.window=6"],
        4,
        ["memory.window=6", "64 microbatch", "use 4, 8 or null"],
    ),
    (
        ["memory=k8", "memory.exchange_ahead=true", "memory.window=32"],
        1,
        ["memory.exchange_ahead=true", "memory.window=32", "64 microbatch", "window=null"],
    ),
    (
        ["memory=k8", "memory.exchange_ahead=true", "memory.window=128"],
        1,
        ["memory.window=128", "64 microbatch", "64 or null"],
    ),
]


@pytest.mark.parametrize(
    ("overrides", "world_size", "words"), REFUSED, ids=[",".join(case[0]) for case in REFUSED]
)
def test_a_topology_that_cannot_run_is_refused_by_name_and_value(overrides, world_size, words):
    with pytest.raises(ConfigError) as refusal:
        compose(overrides, world_size=world_size)
    sentence = str(refusal.value)
    assert "\n" not in sentence and sentence.endswith(".") and sentence.startswith(words[0])
    for word in words:
        assert word in sentence


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [
        (["parallel.pipeline=24", "memory=k8"], 24),
        (["parallel.pipeline=3", "trainer.global_batch_size=32"], 3),  # 1F1B takes any number of microbatches
        (["parallel.pipeline=4", "trainer.global_batch_size=8"], 4),
        (["parallel=pp2_interleaved", "parallel.virtual_pipeline=12"], 2),
        (["parallel=pp2_interleaved", "trainer.global_batch_size=48"], 2),
        (["parallel=pp2_interleaved", "memory=k8", "memory.window=2", OWNERS], 8),
        (["parallel=tp2_pp2", "parallel.zero_stage=2", "memory=k8", OWNERS], 8),
        (["parallel=zero3", "memory=k8"], 8),
        (["parallel=zero3", "parallel.tensor=2"], 8),
        (["memory=k8", "parallel=tp8", OWNERS], 512),  # rows are dealt out in turn: any vocabulary will do
        (["parallel=zero3", "model.tie_embeddings=false"], 8),
        (["memory=k8", "memory.window=64", "memory.exchange_ahead=true"], 1),
        (["memory=k8", "memory.exchange_ahead=true", OWNERS], 8),
        (["memory=k8", "memory.window=1"], 8),
        (["memory=none", "memory.window=2", OWNERS], 8),
        (["memory=none", "memory.exchange_ahead=true"], 8),
        (["memory=none", "trainer.global_batch_size=600", OWNERS], 5),
        (["memory=k8", "memory.window=3"], None),  # without the number of processes no step is known
    ],
)
def test_a_topology_that_runs_is_let_through(overrides, world_size):
    compose(overrides, world_size=world_size)


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [
        (["parallel.pipeline=5"], 24),
        (["parallel.pipeline=5", "parallel.virtual_pipeline=4"], 6),
        (["parallel=pp2_interleaved", "parallel.virtual_pipeline=5"], 2),
        (["parallel=pp2_interleaved", "trainer.global_batch_size=200"], 6),
        (["parallel=pp2", "parallel.zero_stage=3"], 2),
        (["parallel.zero_stage=7"], 2),
        (["parallel=pp2", "parallel.zero_stage=7"], 2),
        (["memory.window=5", "memory=k8"], 2),
        (["parallel=pp2_interleaved", "memory.window=3", "memory=k8"], 4),
        (["memory=k8", "memory.window=100", "memory.exchange_ahead=true"], 1),
    ],
)
def test_every_value_that_a_refusal_offers_is_accepted(overrides, world_size):
    # Another number of stages leaves another number of replicas: a batch that divides over all of them.
    many = compose([*overrides, "trainer.global_batch_size=768"], validate=False)
    config = compose(overrides, validate=False)
    with pytest.raises(ConfigError) as refusal:
        validate(config, world_size)
    key = str(refusal.value).partition("=")[0]
    remedy = str(refusal.value).rpartition(": ")[2].partition(", or ")[0]
    offered = re.findall(r"\b(?:\d+|null)\b", remedy)
    assert offered
    group, name = key.split(".")
    for value in offered:
        base = many if key == "parallel.pipeline" else config
        section = replace(getattr(base, group), **{name: None if value == "null" else int(value)})
        validate(replace(base, **{group: section}), world_size)


def test_a_combination_added_to_those_zero_3_does_not_run_is_refused(monkeypatch):
    tied = ("model.tie_embeddings", lambda config: config.model.tie_embeddings, "for a reason")
    monkeypatch.setattr(shape_rules, "REFUSED_ZERO3", (*shape_rules.REFUSED_ZERO3, tied))
    with pytest.raises(
        ConfigError, match=r"does not run with model\.tie_embeddings=True, for a reason: use 1 or 2"
    ):
        compose(["parallel=zero3"])
    compose(["parallel=zero3", "model.tie_embeddings=false"])
    compose(["parallel.zero_stage=2"])


@pytest.mark.parametrize(
    ("overrides", "world_size", "remedy"),
    [
        (["memory=k8", "model=3b"], 8, ["trainer.micro_batch_size=4"]),
        (["memory=k24", REPLICATED, "trainer.micro_batch_size=1", "cluster.memory_gb=42"], 8, [OWNERS]),
        (["memory=k24", "trainer.micro_batch_size=1", "cluster.memory_gb=30"], 8, ["memory.window=1"]),
        (
            ["data.seq_length=32768", "trainer.micro_batch_size=1", "cluster.memory_gb=45"],
            8,
            ["parallel.recompute=selective"],
        ),
        (["memory=k24", REPLICATED, "model=3b"], 4, ["memory.window=1", "parallel.tensor=4"]),
        (["memory=k24", REPLICATED, "model=3b", "parallel=pp2", "cluster.memory_gb=60"], 8, None),
        (["model=3b", "memory=k24", "cluster.memory_gb=32"], 8, None),
    ],
)
def test_the_remedy_named_for_memory_does_fit(overrides, world_size, remedy):
    words = ["cluster=h100", *overrides]
    with pytest.raises(ConfigError, match=r"^cluster\.memory_gb=.* would fit\.$") as refusal:
        compose(words, world_size=world_size)
    named = re.findall(r"(?:parallel|memory|trainer)\.\w+=\w+", str(refusal.value).rpartition(": ")[2])
    assert named if remedy is None else named == remedy
    compose([*words, *named], world_size=world_size)


def test_a_model_too_large_for_every_topology_is_refused_without_a_promise():
    with pytest.raises(ConfigError, match="use more devices, fewer memory blocks or a smaller model"):
        compose(["cluster=h100", "model=3b", "cluster.memory_gb=1"], world_size=4)
