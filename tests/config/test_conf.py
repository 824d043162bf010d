"""The YAML groups: every option composes, says what it is, and holds values only."""

import re
from pathlib import Path

import pytest

from tests.support.slow import quick_and_slow
from tide_mega.config.hydra_door import compose, find_conf
from tide_mega.config.sizes import count_parameters

CONF = Path(__file__).parents[2] / "conf"
OPTIONS = sorted((path.parent.name, path.stem) for path in CONF.glob("*/*.yaml"))
EXPERIMENTS = [name for group, name in OPTIONS if group == "experiment"]
PAPER_BLOCKS = {"none": 0, "k2": 2, "k4": 4, "k8": 8, "k16": 16, "k24": 24}


def test_the_groups_of_this_checkout_are_found():
    assert find_conf() == CONF


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_validates_and_records_its_name(name):
    config = compose([f"experiment={name}"], world_size=1)
    assert config.experiment == name
    assert config.run.name == f"{config.model.name}-k{config.memory.num_blocks}"


PARALLEL = [name for group, name in OPTIONS if group == "parallel"]


@pytest.mark.parametrize("parallel", quick_and_slow(["tp8", "pp2_interleaved", "zero3"], PARALLEL))
def test_every_topology_runs_every_paper_model_on_eight_nodes(parallel):
    for name in EXPERIMENTS:
        if "demo" not in name:
            compose([f"experiment={name}", f"parallel={parallel}"], world_size=64)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_has_a_comment_that_says_what_it_is(group, option):
    compose([f"{group}={option}"], validate=False)
    text = (CONF / group / f"{option}.yaml").read_text()
    comments = [line for line in text.splitlines() if line.startswith("# ") and "@package" not in line]
    assert comments and len(comments[0]) > 10
    assert "_target_" not in text


@pytest.mark.parametrize("model", [name for group, name in OPTIONS if group == "model"])
def test_the_stated_parameter_count_is_the_models(model):
    first_line = (CONF / "model" / f"{model}.yaml").read_text().splitlines()[0]
    stated = re.fullmatch(r"# ([\d,]+) parameters at K = 0", first_line)
    assert stated, first_line
    config = compose([f"model={model}", "memory=none"], validate=False)
    assert config.model.name == model
    assert count_parameters(config.model, config.memory).total == int(stated.group(1).replace(",", ""))


@pytest.mark.parametrize(("option", "blocks"), PAPER_BLOCKS.items())
def test_memory_options_are_those_of_the_paper(option, blocks):
    assert compose([f"memory={option}"]).memory.num_blocks == blocks


@pytest.mark.parametrize("blocks", [2, 4, 8, 16, 24])
def test_tide_and_base_differ_in_the_memory_alone(blocks):
    base, tide = compose(["experiment=base_1b"]), compose([f"experiment=tide_{blocks}e_1b"])
    assert tide.memory.num_blocks == blocks
    for group in ("model", "parallel", "optim", "data", "trainer"):
        assert getattr(base, group) == getattr(tide, group)


def test_the_demo_compares_at_equal_tokens_and_data_order():
    base, tide = compose(["experiment=demo_base"]), compose(["experiment=demo_tide"])
    assert base.memory.num_blocks == 0 and tide.memory.num_blocks >= 4
    for group in ("model", "optim", "data", "trainer"):
        assert getattr(base, group) == getattr(tide, group)


def test_the_optimizer_is_the_papers():
    optim = compose(["experiment=tide_8e_1b"]).optim
    assert (optim.lr, optim.init_lr, optim.min_lr, optim.warmup_steps) == (1e-4, 1e-6, 1e-5, 10_000)
    assert (optim.beta1, optim.beta2, optim.weight_decay) == (0.9, 0.95, 0.1)


def test_the_command_line_wins_over_an_experiment():
    config = compose(["experiment=tide_8e_1b", "memory=k16", "optim.lr=2e-4", "data=demo"])
    assert (config.memory.num_blocks, config.optim.lr, config.data.seq_length) == (16, 2e-4, 256)
    assert config.run.name == "1b-k16"


def test_an_experiment_wins_over_the_root_defaults():
    assert compose([]).memory.num_blocks == 0
    assert compose(["experiment=tide_8e_3b"]).model.num_layers == 28
