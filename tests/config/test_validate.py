"""Every rule has a case that breaks it alone and a message that names the key and its value."""

import math
from dataclasses import replace

import pytest

from tide_mega.config.hydra_door import compose
from tide_mega.config.validate import CHOICES, NOT_NEGATIVE, POSITIVE, parent_of, total_steps, validate
from tide_mega.errors import ConfigError

CASES = [
    # overrides, world size, words that the sentence has
    (["model.num_attention_heads=30"], None, ["model.hidden_size=2048", "30", "2040 or 2070"]),
    (["model.hidden_size=96"], None, ["model.num_attention_heads=32", "3 channels", "even"]),
    (["model.num_query_groups=5"], None, ["model.num_query_groups=5", "1, 2, 4, 8, 16 or 32"]),
    (["memory.num_blocks=65"], None, ["memory.num_blocks=65", "0 to 64"]),
    (["memory.width=1024"], None, ["memory.width=1024", "model.hidden_size=2048", "null or 2048"]),
    (["parallel.tensor=3"], None, ["parallel.tensor=3", "num_attention_heads=32", "1, 2, 4 or 8"]),
    (["parallel.tensor=16"], None, ["parallel.tensor=16", "num_query_groups=8"]),
    (
        ["parallel.tensor=4", "model.ffn_hidden_size=3586"],
        None,
        ["parallel.tensor=4", "ffn_hidden_size=3586", "1 or 2"],
    ),
    (["parallel.tensor=4", "model.vocab_size=128253"], None, ["model.vocab_size=128253", "128256"]),
    (["parallel.sequence_parallel=true"], None, ["parallel.sequence_parallel=true", "parallel.tensor=2"]),
    (["parallel=tp8", "data.seq_length=2044"], None, ["data.seq_length=2044", "2048"]),
    (["trainer.max_steps=5"], None, ["trainer.max_steps=5", "trainer.max_tokens=200000000000", "null"]),
    (["trainer.max_tokens=null"], None, ["trainer.max_steps=null", "max_steps or max_tokens"]),
    (["optim.init_lr=1e-3"], None, ["optim.init_lr=0.001", "optim.lr=0.0001"]),
    (["optim.min_lr=1e-3"], None, ["optim.min_lr=0.001", "optim.lr=0.0001"]),
    (["optim.beta1=1.0"], None, ["optim.beta1=1.0", "[0, 1)"]),
    (["optim.beta2=-0.1"], None, ["optim.beta2=-0.1", "[0, 1)"]),
    (["optim.decay_steps=10000"], None, ["optim.decay_steps=10000", "10001"]),
    (
        ["optim.schedule=wsd", "optim.decay_steps=20000"],
        None,
        ["optim.decay_steps=20000", "optim.cooldown_steps"],
    ),
    (["optim.cooldown_steps=5"], None, ["optim.cooldown_steps=5", "optim.schedule=wsd"]),
    (["optim.rewarmup_steps=5"], None, ["optim.rewarmup_steps=5", "run.from=<run folder>@<step>"]),
    (
        ["checkpoint.export_hf_every=1500"],
        None,
        ["checkpoint.export_hf_every=1500", "checkpoint.every=1000", "such as 2000"],
    ),
    (
        ["checkpoint.export_hf_every=1000", "checkpoint.every=0"],
        None,
        ["checkpoint.export_hf_every=1000", "checkpoint.every=0"],
    ),
    (["run.from=' '"], None, ["run.from=' '", "empty"]),
    (["optim.lr=nan"], None, ["optim.lr=nan", "finite"]),
    (["trainer.z_loss=inf"], None, ["trainer.z_loss=inf", "finite"]),
    (["run.name=a/b"], None, ["run.name='a/b'", "path separators"]),
    (["run.name=.."], None, ["run.name='..'"]),
    (["run.name=''"], None, ["run.name=''"]),
    (["run.root=''"], None, ["run.root=''", "blank"]),
    (["data.path=''"], None, ["data.path=''", "blank"]),
    (["parallel=tp2"], 3, ["parallel.tensor=2", "3 process", "multiple of 2"]),
    (
        ["trainer.global_batch_size=100"],
        8,
        ["trainer.global_batch_size=100", "micro_batch_size=8", "64 or 128"],
    ),
    (["trainer.global_batch_size=32"], 8, ["trainer.global_batch_size=32", "use 64"]),
    (["cluster=h100", "memory=k24"], 1, ["cluster.memory_gb=80", "192.9 GB", "num_blocks=24", "1 device"]),
    (
        ["cluster=h100", "memory=k24", "memory.owners=tensor", "model=3b"],
        4,
        ["cluster.memory_gb=80", "memory.window=1 with parallel.tensor=4 would fit"],
    ),
]


@pytest.mark.parametrize(
    ("overrides", "world_size", "words"), CASES, ids=[",".join(case[0]) for case in CASES]
)
def test_a_broken_rule_is_refused_by_name_and_value(overrides, world_size, words):
    with pytest.raises(ConfigError) as refusal:
        compose(overrides, world_size=world_size)
    sentence = str(refusal.value)
    assert "\n" not in sentence and sentence.endswith(".")
    for word in words:
        assert word in sentence


DEFAULT = compose([])


def changed(key, value):
    config = DEFAULT
    group, name = key.split(".")
    return replace(config, **{group: replace(getattr(config, group), **{name: value})})


@pytest.mark.parametrize("key", CHOICES)
def test_an_unknown_choice_is_refused_with_the_known_ones(key):
    with pytest.raises(ConfigError) as refusal:
        validate(changed(key, "nonsense"))
    assert f"{key}=nonsense" in str(refusal.value)
    for choice in CHOICES[key]:
        assert choice in str(refusal.value)
        validate(changed(key, choice))


@pytest.mark.parametrize("key", POSITIVE)
@pytest.mark.parametrize("value", [0, -1])
def test_a_number_that_must_be_positive_is(key, value):
    with pytest.raises(ConfigError, match=f"^{key}={value} is not positive"):
        validate(changed(key, value))


@pytest.mark.parametrize("key", NOT_NEGATIVE)
def test_a_number_that_must_not_be_negative_is_not(key):
    with pytest.raises(ConfigError, match=f"^{key}=-1 is negative"):
        validate(changed(key, -1))


def test_an_unset_value_is_named():
    with pytest.raises(ConfigError, match=r"^data\.path=\?\?\? is not set"):
        validate(changed("data.path", "???"))


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [
        ([], 1),
        ([], 64),
        (["parallel=tp2", "memory=k8", "cluster=h100"], 8),
        (["memory.width=2048"], 1),
        (["optim.init_lr=0", "optim.min_lr=1e-4", "optim.warmup_steps=0", "optim.clip_grad=0"], 1),
        (["memory=k24", "cluster=h100"], 8),
        (["cluster=b200", "memory=k24"], 2),
        (["trainer.global_batch_size=64", "trainer.micro_batch_size=8"], 8),
    ],
)
def test_what_can_run_is_let_through(overrides, world_size):
    compose(overrides, world_size=world_size)


def test_total_steps_rounds_tokens_up_to_whole_steps():
    batch = ["trainer.global_batch_size=4", "trainer.micro_batch_size=4", "data.seq_length=10"]
    optim = ["optim.warmup_steps=1"]
    assert total_steps(compose([*batch, *optim, "trainer.max_tokens=81"])) == 3
    assert total_steps(compose([*batch, *optim, "trainer.max_tokens=120"])) == 3
    assert total_steps(compose([*optim, "trainer.max_tokens=null", "trainer.max_steps=7"])) == 7


@pytest.mark.parametrize(
    ("word", "parent"),
    [
        ("runs/a@3", ("runs/a", 3)),
        ("runs/a", ("runs/a", None)),
        ("runs/a@home", ("runs/a@home", None)),
        ("me@here/a@07", ("me@here/a", 7)),
    ],
)
def test_a_branch_names_a_run_folder_and_a_step(word, parent):
    path, step = parent_of(compose([f"run.from={word}"]))
    assert (str(path), step) == parent
    assert parent_of(compose([])) is None


def test_the_paper_run_has_200_billion_tokens():
    config = compose(["experiment=tide_8e_1b"])
    assert total_steps(config) == math.ceil(200e9 / (512 * 2048)) == 190_735
