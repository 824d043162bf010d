"""The switch reaches torch and, on a GPU, cuBLAS and NCCL; all of it is undone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.runs import TINY, curve, tiny, train_here, train_until
from tide_mega.errors import ConfigError
from tide_mega.parallel.determinism import deterministic_algorithms
from tide_mega.parallel.device import Device
from tide_mega.parallel.groups import World, start_distributed, stop_distributed

ROOT = Path(__file__).parents[2]
CPU = Device(torch.device("cpu"), "gloo", "cpu")
GPU = Device(torch.device("cuda", 0), "gloo", "a GPU")
NAMES = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def state():
    flags = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    return *flags, *(os.environ.get(name) for name in NAMES)


def test_a_gpu_gets_its_environment_and_all_is_undone():
    before = state()
    with deterministic_algorithms(True, GPU):
        assert state() == (True, False, ":4096:8", "^NVLS,NVLSTree")
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert state() == before == (False, True, None, None)


def test_a_cpu_needs_no_environment_and_off_is_off():
    with deterministic_algorithms(True, CPU):
        assert state() == (True, False, None, None)
    with deterministic_algorithms(False, GPU):
        assert state() == (False, True, None, None)


def test_an_error_inside_undoes_it_too():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with pytest.raises(KeyError), deterministic_algorithms(True, GPU):
            raise KeyError
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert state() == (False, True, None, None)


def test_what_the_user_set_and_is_deterministic_stays(monkeypatch):
    monkeypatch.setenv(NAMES[0], ":16:8")
    monkeypatch.setenv(NAMES[1], "Ring")
    with deterministic_algorithms(True, GPU):
        assert state()[2:] == (":16:8", "Ring")
    assert state()[2:] == (":16:8", "Ring")


@pytest.mark.parametrize(("name", "value"), [(NAMES[0], ":4096:2:16:8"), (NAMES[1], "NVLS,Ring")])
def test_what_the_user_set_and_is_not_deterministic_is_refused(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=rf"trainer\.deterministic=true .*{name}.*unset it"):
        deterministic_algorithms(True, GPU).__enter__()
    assert state()[0] is False
    with deterministic_algorithms(True, CPU):
        assert os.environ[name] == value


def test_it_lasts_from_the_start_of_the_groups_to_their_end():
    start_distributed(CPU, World(0, 1, 0, 1), 1, deterministic=True)
    assert state()[:2] == (True, False)
    start_distributed(CPU, World(0, 1, 0, 1), 1)
    assert state()[:2] == (False, True)
    start_distributed(CPU, World(0, 1, 0, 1), 1, deterministic=True)
    stop_distributed()
    assert state()[:2] == (False, True)


def train_deterministically(function, *arguments):
    """Call a training function of `tests.support.runs` as `train` would; return its result and the state after."""
    with deterministic_algorithms(True, CPU):
        result = function(*arguments)
    return result, state()


@pytest.mark.parametrize(
    ("world", "words"),
    [
        (1, ()),
        pytest.param(
            2,
            ("parallel.tensor=2", "parallel.sequence_parallel=true", "memory.owners=tensor_data"),
            marks=pytest.mark.slow,
        ),
        (2, ("trainer.precision=bf16", "parallel.pipeline=2", "parallel.recompute=full")),
    ],
)
def test_a_run_killed_and_resumed_has_the_bits_of_one_that_was_not(pools, tiny_data, tmp_path, world, words):
    def config(name):
        return tiny(tiny_data, tmp_path / name, "trainer.deterministic=true", *words, world_size=world)

    whole, broken = config("whole"), config("broken")
    off = (False, True, None, None)
    assert pools(world).run(train_deterministically, train_here, whole) == [(6, off)] * world
    pools(world).run(train_deterministically, train_until, broken, 4)
    assert pools(world).run(train_deterministically, train_here, broken) == [(6, off)] * world
    curves = [
        {line["step"]: line["loss"] for line in curve(path / "tiny" / "metrics.jsonl") if "loss" in line}
        for path in (tmp_path / "whole", tmp_path / "broken")
    ]
    assert curves[0] == curves[1] and 6 in curves[0]


START = """
import sys, torch
from tide_mega.config.hydra_door import compose
from tide_mega.training import trainer
from tide_mega.run.console import set_up_logging

set_up_logging()
train = trainer.Trainer.run
trainer.Trainer.run = lambda self: print("within", torch.are_deterministic_algorithms_enabled()) or train(self)
trainer.train(compose(sys.argv[1:]))
print("after", torch.are_deterministic_algorithms_enabled())
"""


@pytest.mark.slow
def test_the_entry_point_switches_it_on_and_says_so(tiny_data, tmp_path):
    words = [*TINY, f"data.path={tiny_data}", f"run.root={tmp_path}", "run.name=tiny", "trainer.max_steps=3"]
    done = subprocess.run(
        [sys.executable, "-c", START, *words, "trainer.deterministic=true"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "deterministic: the same steps" in done.stdout
    assert "within True" in done.stdout and "after False" in done.stdout
