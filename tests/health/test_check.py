import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.support.runs import tiny
from tide_mega.health import check as module
from tide_mega.health.check import check
from tide_mega.health.facts import Facts, _gpus
from tide_mega.health.meeting import StoreRendezvous
from tide_mega.parallel.groups import World

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT", "TIDE_NODES", "SLURMD_NODENAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURMD_NODENAME", "here")


@pytest.fixture
def sick_list(monkeypatch, tmp_path):
    monkeypatch.setenv("TIDE_SICK_LIST", str(tmp_path / "sick"))
    return tmp_path / "sick"


def test_a_healthy_process_alone(tmp_path, capsys, sick_list):
    assert check(tiny(Path("data"), tmp_path / "runs"), World(0, 1, 0, 1), 5.0)
    printed = capsys.readouterr().out
    assert "1 ranks on 1 node(s) may train" in printed and "here" in printed
    assert list((tmp_path / "runs").iterdir()) == [] and not sick_list.exists()


def test_a_folder_that_cannot_be_is_named(tmp_path, capsys, sick_list):
    (tmp_path / "file").write_text("")
    assert not check(tiny(Path("data"), tmp_path / "file"), World(0, 1, 0, 1), 5.0)
    assert f"sick: here: run.root={tmp_path / 'file'} cannot be" in capsys.readouterr().out
    assert sick_list.read_text() == "here\n"


def test_a_rank_that_does_not_come_is_named_by_its_node(tmp_path, capsys, monkeypatch, sick_list):
    monkeypatch.setenv("TIDE_NODES", "here there")
    assert not check(tiny(Path("data"), tmp_path), World(0, 2, 0, 1), 0.3)
    assert "sick: there: did not report in time" in capsys.readouterr().out
    assert sick_list.read_text() == "there\n"


def test_a_rank_that_does_not_find_rank_0_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "collect", lambda config, world: Facts(1, "there", 0, 1))
    monkeypatch.setenv("MASTER_PORT", "1")
    assert not check(tiny(Path("data"), tmp_path), World(1, 2, 0, 1), 0.1)
    assert "there, rank 1: rank 0 at 127.0.0.1:1 was not reached" in capsys.readouterr().err


def test_a_meeting_collects_and_announces():
    host = StoreRendezvous("127.0.0.1", 0, 0, 2, 5.0)
    heard = []

    def guest():
        here = StoreRendezvous("127.0.0.1", host.store.port, 1, 2, 5.0)
        assert here.collect("value", 11, {0, 1}) == {}
        heard.append(here.announce("sum"))

    thread = threading.Thread(target=guest)
    thread.start()
    values = host.collect("value", 10, {0, 1})
    assert values == {0: 10, 1: 11}
    host.announce("sum", sum(values.values()))
    thread.join(10)
    assert heard == [21]


@pytest.mark.slow
def test_the_command_checks_the_configuration_first():
    words = [sys.executable, "-m", "tide_mega.health", "optim.lr=abc"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "optim.lr" in done.stderr


def test_a_gpu_that_does_not_answer_is_named_and_keeps_its_place(monkeypatch):
    def properties(index):
        if index == 1:
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nmore lines")
        return SimpleNamespace(name="NVIDIA H100", total_memory=80 * 2**30)

    def memory(index):
        if index == 2:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure")
        return (10 if index == 3 else 79) * 2**30, 80 * 2**30

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
    problems: list[str] = []
    assert _gpus(problems) == ["NVIDIA H100 80 GiB", "unusable", "unusable", "NVIDIA H100 80 GiB"]
    assert problems == [
        "GPU 1 does not answer: CUDA error: uncorrectable ECC error encountered more lines",
        "GPU 2 does not answer: CUDA error: unspecified launch failure",
        "GPU 3 has 70 GiB in use by someone else",
    ]
