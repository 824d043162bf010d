"""The kill test's own judgement, and a few real kills."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.checkpoints import write_step
from tests.support.tools import tool_module
from tide_mega.errors import ConfigError
from tide_mega.lab.bench.killable import MARK, damaged, digest, state_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool():
    with tool_module("kill_test") as module:
        yield module


def test_the_state_a_kill_left_is_named(tmp_path):
    assert state_of(tmp_path) == "nothing saved yet"
    write_step(tmp_path, 3)
    assert state_of(tmp_path) == "no save under way"
    partial = tmp_path / "step-00000006.partial"
    partial.mkdir()
    assert state_of(tmp_path) == "an empty save"
    (partial / "rank-00000.safetensors").touch()
    assert state_of(tmp_path) == "half a save"
    (partial / "manifest.json").touch()
    assert state_of(tmp_path) == "manifest written, not renamed"
    (partial / MARK).touch()
    assert state_of(tmp_path) == "no save under way"


def test_the_digest_depends_on_the_newest_values_alone(tmp_path):
    for name in ("a", "b"):
        write_step(tmp_path / name, 3, save_id=name)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    write_step(tmp_path / "b", 4)
    assert digest(tmp_path / "a") != digest(tmp_path / "b")


def test_a_damaged_checkpoint_with_a_complete_name_is_seen(tmp_path):
    write_step(tmp_path, 3)
    assert damaged(tmp_path) == []
    (tmp_path / "step-00000003" / "tensors.json").write_text(json.dumps({}))
    assert any("tensors.json has 2 bytes" in said for said in damaged(tmp_path))


def test_flags_and_keys_are_read_alike(tool):
    assert tool.read_arguments(["--kills", "50", "--seed", "7", "steps=9"]) == tool.Options(50, 7, 9)
    with pytest.raises(ConfigError, match="kills=0 is not positive"):
        tool.read_arguments(["--kills", "0"])


@pytest.mark.slow
def test_killed_runs_end_as_the_undisturbed_one():
    done = subprocess.run(
        [sys.executable, "tools/kill_test.py", "--kills", "4", "--seed", "11", "steps=20"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "4 kills in" in done.stdout and " 0 wrong;" in done.stdout
