import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tide_mega.config.errors import ConfigError
from tide_mega.config.hydra_door import compose, from_yaml, to_yaml

ROOT = Path(__file__).parents[2]
WRONG = [
    ("optim.lrr=2", "Unknown key optim.lrr: did you mean optim.lr?"),
    ("optim.zebra=2", "Unknown key optim.zebra: optim has lr, init_lr"),
    ("foo=1", "Unknown key foo: known keys are model, memory"),
    ("+foo=1", "Unknown key foo: "),
    ("+optim.extra=1", "Unknown key optim.extra: "),
    ("optim.lr=abc", "optim.lr=abc has the wrong type: it takes float."),
    ("trainer.max_steps=1.5", "trainer.max_steps=1.5 has the wrong type: it takes int or null."),
    ("memory.num_blocks=null", "memory.num_blocks=null has the wrong type: it takes int."),
    (
        "parallel.sequence_parallel=maybe",
        "parallel.sequence_parallel=maybe has the wrong type: it takes bool.",
    ),
    ("model=2b", "model=2b does not exist: use 1b, 350m, 3b, 750m or demo."),
    ("experiment=nope", "experiment=nope does not exist: use "),
    ("optim=null", "optim=null names no option of optim: use demo or paper."),
    ("optim=[paper]", "optim=[paper] names no option of optim"),
    ("~optim.lr", "optim.lr cannot be deleted"),
    ("optim.lr", "optim.lr cannot be read as group=option or key=value"),
    ("optim.lr=1,2", "optim.lr=1,2 gives several values: add --multirun"),
    ("data.path=???", "data.path is not set: give data.path=<value>"),
    ("run.name=${nope}", "run.name: Interpolation key 'nope' not found"),
]


@pytest.mark.parametrize(("override", "start"), WRONG)
def test_a_mistake_is_one_sentence(override, start):
    with pytest.raises(ConfigError) as refusal:
        compose([override])
    assert str(refusal.value).startswith(start)
    assert "\n" not in str(refusal.value)


def test_a_configuration_survives_its_yaml():
    config = compose(["experiment=tide_8e_1b", "optim.table_weight_decay=0.0", "run.name='on: off'"])
    assert from_yaml(to_yaml(config)) == config
    changed = replace(config, optim=replace(config.optim, lr=3.14159e-7))
    assert from_yaml(to_yaml(changed)) == changed != config


def test_yaml_with_an_unknown_key_is_refused():
    text = to_yaml(compose([])).replace("  clip_grad:", "  clip_gradient:")
    with pytest.raises(
        ConfigError, match=r"^Unknown key optim\.clip_gradient: did you mean optim\.clip_grad\?"
    ):
        from_yaml(text)


def test_compose_can_leave_out_validation():
    assert compose(["parallel.tensor=3"], validate=False).parallel.tensor == 3
    with pytest.raises(ConfigError):
        compose(["parallel.tensor=3"])


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A training entry point that prints its configuration, without torch."""
    path = tmp_path_factory.mktemp("program") / "train.py"
    path.write_text(
        "from tide_mega.config.errors import ConfigError\n"
        "from tide_mega.config.hydra_door import hydra_entry\n"
        "def main(config):\n"
        "    if config.data.path == 'broken': raise ConfigError('data.path=broken has no index')\n"
        "    if config.data.path == 'bug': raise RuntimeError('a bug')\n"
        "    print('ran', config.experiment, config.memory.num_blocks, config.optim.lr)\n"
        "if __name__ == '__main__': hydra_entry(main)\n"
    )
    return path


def start(program, *words, cwd, **environment):
    environment = os.environ | environment
    command = [sys.executable, str(program), *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_entry_point_runs_with_overrides_and_leaves_no_files(program, tmp_path):
    done = start(program, "experiment=tide_8e_1b", "memory=k16", "optim.lr=2e-4", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ran tide_8e_1b 16 0.0002\n", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "word", ["optim.lrr=2", "optim.lr=abc", "parallel.tensor=3", "+foo=1", "data.path=broken"]
)
def test_entry_point_answers_a_mistake_with_one_sentence_and_status_2(program, tmp_path, word):
    done = start(program, word, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert word.lstrip("+").split("=")[0] in done.stderr


def test_entry_point_knows_the_world_size_and_only_rank_0_speaks(program, tmp_path):
    word = "trainer.micro_batch_size=7"
    first = start(program, word, cwd=tmp_path, WORLD_SIZE="8", RANK="0")
    second = start(program, word, cwd=tmp_path, WORLD_SIZE="8", RANK="1")
    assert (first.returncode, second.returncode) == (2, 2)
    assert "504 or 560" in first.stderr
    assert second.stderr == ""


def test_a_failure_that_is_no_configuration_error_keeps_its_traceback(program, tmp_path):
    done = start(program, "data.path=bug", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "RuntimeError: a bug" in done.stderr and "in main" in done.stderr


def test_help_lists_every_group_option_and_key(program, tmp_path):
    done = start(program, "--help", cwd=tmp_path)
    assert done.returncode == 0
    for path in (ROOT / "conf").glob("*/*.yaml"):
        assert f"  {path.parent.name}=" in done.stdout
        assert f"    {path.stem} " in done.stdout
    assert "optim.lr (float, default 0.0001)" in done.stdout
    assert "Peak learning rate, reached after `warmup_steps`." in done.stdout
    assert "Examples" in done.stdout


def test_cfg_job_prints_the_composed_configuration_and_does_not_run(program, tmp_path):
    done = start(program, "--cfg", "job", "--resolve", "memory=k4", cwd=tmp_path)
    assert done.returncode == 0
    assert "num_blocks: 4" in done.stdout and "name: 1b-k4" in done.stdout
    assert "ran" not in done.stdout.split()


def test_info_and_multirun_work(program, tmp_path):
    assert "memory/k4" in start(program, "--info", "defaults", "memory=k4", cwd=tmp_path).stdout
    done = start(program, "--multirun", "experiment=demo_tide", "memory=k2,k8", cwd=tmp_path)
    assert done.returncode == 0
    assert [line for line in done.stdout.splitlines() if line.startswith("ran")] == [
        "ran demo_tide 2 0.003",
        "ran demo_tide 8 0.003",
    ]


def test_config_dir_adds_options_of_the_users_own(program, tmp_path):
    (tmp_path / "mine" / "memory").mkdir(parents=True)
    (tmp_path / "mine" / "memory" / "k7.yaml").write_text("num_blocks: 7\n")
    done = start(program, "--config-dir", str(tmp_path / "mine"), "memory=k7", cwd=tmp_path)
    assert done.stdout.startswith("ran None 7")
