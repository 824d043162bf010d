import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tide_mega.config.command_line import sort_words
from tide_mega.config.help import keyed
from tide_mega.config.hydra_door import compose, from_yaml, to_yaml
from tide_mega.errors import ConfigError, Exit

ROOT = Path(__file__).parents[2]
WRONG = [
    ("optim.lrr=2", "Unknown key optim.lrr: did you mean optim.lr?"),
    ("optim.zebra=2", "Unknown key optim.zebra: optim has lr, init_lr"),
    ("run.from_=a", "Unknown key run.from_: did you mean run.from?"),
    ("run.form=a", "Unknown key run.form: did you mean run.from?"),
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
    (f"trainer.seed={2**63}", f"trainer.seed={2**63} has more than 64 bits: use a smaller one."),
    ("optim.lr.x=1", "Unknown key optim.lr.x: optim.lr has no keys of its own, give optim.lr=<value>."),
    ("data.perplexity_texts.0=1", "Unknown key data.perplexity_texts.0: data.perplexity_texts has no keys"),
    ("hydra/launcher=nan", "hydra/launcher=nan does not exist: use basic"),
    ("hydra/launcher=null", "hydra/launcher=null names no option of hydra/launcher"),
    ("=1", "'=1' has no key: give group=option or key=value."),
    ("@=1", "'@=1' has no key: "),
    (
        "optim.lr=é",
        "optim.lr=é cannot be read as group=option or key=value: it has a character that is out of",
    ),
    ("run.name=null", "run.name=null has the wrong type: it takes str."),
    ("run.name=a,b", "run.name=a,b gives several values: add --multirun"),
    ("run.name=", "run.name='' is blank: give a name."),
    ("run.name=' '", "run.name=' ' is blank: give a name."),
    ("run.name=a\nb", "run.name='a\\nb' has a line break or another control character: leave it out."),
    ("run.name=..", "run.name='..' is not a folder's name: use a name without path separators."),
    ("run.name=a/b", "run.name='a/b' is not a folder's name"),
    (
        "run.name=" + "é" * 128,
        "run.name=" + "é" * 57 + "... has a name of 256 bytes, and a folder's has at most 255",
    ),
    ("run.root=a/" + "b" * 256, "run.root=" + "b" * 57 + "... has a name of 256 bytes"),
    ("data.path=" + "a/" * 2000, "data.path=" + "a/" * 28 + "a... is longer than 3840 bytes"),
    ("checkpoint.remote=", "checkpoint.remote='' is blank: give a folder."),
]


@pytest.mark.parametrize(("override", "start"), WRONG)
def test_a_mistake_is_one_sentence(override, start):
    with pytest.raises(ConfigError) as refusal:
        compose([override])
    assert str(refusal.value).startswith(start)
    assert "\n" not in str(refusal.value)


WORDS = [
    "2024_10_01",
    "1e-4",
    "007",
    "1_0",
    "true",
    "inf",
    "-0",
    "a=b",
    "a b",
    "a#b",
    "été",
    "it's",
    "a(1",
    "2~",
    "off",
]


@pytest.mark.parametrize("word", WORDS)
def test_text_is_taken_as_typed_and_survives_the_yaml(word):
    texts = f"data.perplexity_texts=[x,{word.replace('a(1', 'b')}]"
    config = compose([f"run.name={word}", texts], validate=False)
    assert (config.run.name, config.data.perplexity_texts[1]) == (word, word.replace("a(1", "b"))
    assert from_yaml(to_yaml(config)) == config


def test_text_in_a_whole_section_and_in_quotes_is_text_too():
    config = compose(["run={name: 1e-4, root: 007}", "data.path='2024_10_01'", r"logging.wandb_project=a\,1"])
    assert (config.run.name, config.run.root) == ("1e-4", "007")
    assert (config.data.path, config.logging.wandb_project) == ("2024_10_01", "a,1")
    assert compose(["optim.lr=1e-4", "run.name=lr=${optim.lr}"]).run.name == "lr=0.0001"


def test_a_configuration_survives_its_yaml():
    config = compose(["experiment=tide_8e_1b", "optim.table_weight_decay=0.0", "run.name='on: off'"])
    assert from_yaml(to_yaml(config)) == config
    changed = replace(config, optim=replace(config.optim, lr=3.14159e-7))
    assert from_yaml(to_yaml(changed)) == changed != config


def test_a_key_that_is_a_word_of_python_is_written_as_it_is():
    config = compose(["run.from=runs/a@3"])
    assert config.run.from_ == "runs/a@3" and compose([]).run.from_ is None
    text = to_yaml(config)
    assert "  from: runs/a@3\n" in text and "from_" not in text
    assert from_yaml(text) == config
    assert keyed(config)["run"] == {"name": config.run.name, "root": "runs", "from": "runs/a@3"}


def test_yaml_with_an_unknown_key_is_refused():
    text = to_yaml(compose([])).replace("  clip_grad:", "  clip_gradient:")
    with pytest.raises(
        ConfigError, match=r"^Unknown key optim\.clip_gradient: did you mean optim\.clip_grad\?"
    ):
        from_yaml(text)


ALIASES = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            "run: {name: '${oc.env:MARKER}'}",
            r"^run\.name=\$\{oc\.env:MARKER\} has \$\{, and stored configurations",
        ),
        (
            "data: {perplexity_texts: [a, '${oc.env:MARKER}']}",
            r"^data\.perplexity_texts=\$\{oc\.env:MARKER\} has ",
        ),
        ("optim: {lr: '${optim.min_lr}'}", r"^optim\.lr=\$\{optim\.min_lr\} has "),
        (ALIASES, r"^line 2 has the alias \*a, and stored values are plain"),
        ("run: " + "[" * 5_000, "^line 1 is nested more than 32 levels deep"),
        ("run: {name: " + "9" * 5000 + "}", "4300 digits"),
        ("# " + "x" * 300_000, "^it is longer than 256 KiB"),
        ("run: !!python/name:os.system", "^it is not YAML"),
        ("3", "^it is not a mapping"),
        ("[1, 2]", "^it is not a mapping"),
    ],
    ids=["variable", "in_a_list", "key", "alias", "deep", "digits", "long", "tag", "number", "list"],
)
def test_a_stored_configuration_is_plain_values(text, why, monkeypatch):
    monkeypatch.setenv("MARKER", "a value of the reader's environment")
    with pytest.raises(ConfigError, match=why) as info:
        from_yaml(text)
    assert "reader" not in str(info.value) and "\n" not in str(info.value)


def test_what_could_not_be_read_back_is_refused_at_the_start():
    with pytest.raises(ConfigError, match=r"^run\.name=\$\{x\} has \$\{, .*: write what it stands for\."):
        compose([r"run.name='\${x}'"])


def test_compose_can_leave_out_validation():
    assert compose(["parallel.tensor=3"], validate=False).parallel.tensor == 3
    with pytest.raises(ConfigError):
        compose(["parallel.tensor=3"])


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A training entry point that prints its configuration, without torch."""
    path = tmp_path_factory.mktemp("program") / "train.py"
    path.write_text(
        "import logging, os\n"
        "from tide_mega.errors import ConfigError\n"
        "from tide_mega.config.hydra_door import hydra_entry\n"
        "def main(config):\n"
        "    if config.data.path == 'broken': raise ConfigError('data.path=broken has no index')\n"
        "    if config.data.path == 'bug': raise RuntimeError('a bug')\n"
        "    if config.data.path == 'diverged': raise SystemExit(4) from ValueError('the loss is NaN')\n"
        "    if config.data.path == 'logs': logging.getLogger('tide_mega.here').error(config.optim.lr)\n"
        "    if config.data.path == 'killed': os._exit(9)\n"
        "    if config.data.path == 'named': print(repr(config.run.name))\n"
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


def test_flags_may_stand_between_overrides(program, tmp_path):
    done = start(
        program, "optim.lr=1e-3,2e-3", "-m", "experiment=demo_tide", "--config-name", "config", cwd=tmp_path
    )
    assert done.returncode == 0
    assert [line for line in done.stdout.splitlines() if line.startswith("ran")] == [
        "ran demo_tide 4 0.001",
        "ran demo_tide 4 0.002",
    ]


def test_every_point_of_a_sweep_has_its_log(program, tmp_path):
    done = start(program, "--multirun", "optim.lr=1e-3,2e-3,3e-3", "data.path=logs", cwd=tmp_path)
    assert [line for line in done.stderr.splitlines() if line.startswith("0.")] == ["0.001", "0.002", "0.003"]


@pytest.mark.parametrize("values", ["2024_10_01,1e-4,007", "choice(2024_10_01,1e-4,007)"])
def test_the_values_of_a_sweep_are_taken_as_typed(program, tmp_path, values):
    done = start(program, "--multirun", f"run.name={values}", "data.path=named", cwd=tmp_path)
    named = [line for line in done.stdout.splitlines() if line.startswith("'")]
    assert named == ["'2024_10_01'", "'1e-4'", "'007'"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--foo"], "--foo is no flag: the flags are --help, "),
        (["--cfg", "job", "-m"], "--multirun and --cfg exclude each other: give one of them."),
        (["--cfg", "x"], "--cfg x does not exist: use job, hydra, all."),
        (["--cfg"], "--cfg has no value: give --cfg <job|hydra|all>."),
        (["--resolve"], "--resolve says how --cfg prints: give --cfg job too."),
        (["--multirun=3"], "--multirun=3 cannot be read: --multirun takes no value."),
    ],
)
def test_a_wrong_flag_is_one_sentence(words, sentence):
    with pytest.raises(ConfigError) as refusal:
        sort_words(words)
    assert str(refusal.value).startswith(sentence) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("words", "sorted_words"),
    [
        (["-m", "a=1", "--resolve", "--help"], ["a=1", "--multirun", "--resolve", "--help"]),
        (["--info", "b=2"], ["b=2", "--info"]),
        (["--config-dir=x=y", "a=1", "--cfg=job"], ["a=1", "--config-dir", "x=y", "--cfg", "job"]),
        (["-cd", "x=y", "~a", "--multi"], ["~a", "--config-dir", "x=y", "--multirun"]),
    ],
)
def test_overrides_come_before_flags(words, sorted_words):
    assert sort_words(words) == sorted_words


def test_a_sweep_goes_on_after_points_that_fail_and_names_them(program, tmp_path):
    points = "data.path=broken,bug,diverged,good"
    done = start(program, points, "--multirun", "optim.lr=-1,1e-3", "experiment=demo_tide", cwd=tmp_path)
    assert done.returncode == Exit.SWEEP == 8
    assert [line for line in done.stdout.splitlines() if line.startswith("ran")] == ["ran demo_tide 4 0.001"]
    _, _, summed_up = done.stderr.partition("Sweep: ")
    assert summed_up.splitlines() == [
        "1 of 8 points done, 7 failed; the same command runs these again:",
        *(
            f"  #{n} {w}: status {s}, {why}"
            for n, w, s, why in [
                (
                    0,
                    "data.path=broken optim.lr=-1",
                    2,
                    "optim.lr=-1.0 is not positive: give a number above 0.",
                ),
                (1, "data.path=broken optim.lr=0.001", 2, "data.path=broken has no index"),
                (2, "data.path=bug optim.lr=-1", 2, "optim.lr=-1.0 is not positive: give a number above 0."),
                (3, "data.path=bug optim.lr=0.001", 1, "RuntimeError: a bug"),
                (
                    4,
                    "data.path=diverged optim.lr=-1",
                    2,
                    "optim.lr=-1.0 is not positive: give a number above 0.",
                ),
                (5, "data.path=diverged optim.lr=0.001", 4, "the loss is NaN"),
                (6, "data.path=good optim.lr=-1", 2, "optim.lr=-1.0 is not positive: give a number above 0."),
            ]
        ),
    ]
    assert "Traceback" in done.stderr, "of the error that nobody foresaw"
    assert list((tmp_path / "runs").glob(".sweep*")) == []


@pytest.mark.slow
def test_points_in_other_processes_are_accounted_for_too(program, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="extra sweep")
    words = ("hydra/launcher=submitit_local", "hydra.sweep.dir=sweep", "data.path=good,broken,killed")
    done = start(program, "--multirun", *words, cwd=tmp_path)
    assert done.returncode == Exit.SWEEP
    assert done.stderr.partition("Sweep: ")[2].splitlines() == [
        "1 of 3 points done, 2 failed; the same command runs these again:",
        "  #1 data.path=broken: status 2, data.path=broken has no index",
        "  #2 data.path=killed: no word of its end",
    ]
    assert [path.name for path in (tmp_path / "sweep").glob(".sweep*")] == []


def test_of_several_ranks_only_what_all_find_alike_is_passed_over(program, tmp_path):
    ranks = {"WORLD_SIZE": "2", "RANK": "0"}
    done = start(program, "--multirun", "data.path=broken,bug,good", cwd=tmp_path, **ranks)
    assert done.returncode == 1 and "RuntimeError: a bug" in done.stderr
    assert "ran" not in done.stdout.split()
    assert "1 of 2 points" not in done.stdout and "#0 data.path=broken: status 2" in done.stderr


def test_config_dir_adds_options_of_the_users_own(program, tmp_path):
    (tmp_path / "mine" / "memory").mkdir(parents=True)
    (tmp_path / "mine" / "memory" / "k7.yaml").write_text("num_blocks: 7\n")
    done = start(program, "--config-dir", str(tmp_path / "mine"), "memory=k7", cwd=tmp_path)
    assert done.stdout.startswith("ran None 7")
