import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.support.tools import tool_module
from tide_mega.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def facts():
    with tool_module("gpu_facts") as module:
        yield module


@pytest.mark.parametrize(
    ("gigabytes", "experiment"),
    [
        (192, "tide_8e_3b"),
        (141, "tide_8e_3b"),
        (120, "tide_8e_1b"),
        (80, "tide_8e_1b"),
        (72, "tide_8e_1b"),
        (64, "tide_8e_750m"),
        (40, "tide_8e_350m"),
    ],
)
def test_the_largest_model_that_fits_is_chosen(facts, gigabytes, experiment):
    assert facts.largest_fitting(int(gigabytes * 1e9)) == experiment


def test_a_gpu_too_small_for_all_is_told_what_the_smallest_needs(facts):
    with pytest.raises(ConfigError, match=r"fits 12\.0 GB; the smallest, tide_8e_350m, needs 31\.1 GB"):
        facts.largest_fitting(int(12e9))


def test_the_last_measured_line_is_reported(facts, tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 5, "kind": "train", "loss": 7.5, "tokens_per_second": 100.0, "mfu": 0.1},
        {"step": 10, "kind": "train", "loss": 6.25, "tokens_per_second": 123456.7, "mfu": 0.412},
        {"step": 10, "kind": "eval", "loss": 6.5},
    ]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert facts.last_throughput(path) == "step 10: loss 6.2500, 123,457 tokens/s, MFU 41.2 %"


def test_a_run_without_metrics_is_an_error(facts, tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        facts.last_throughput(tmp_path / "none.jsonl")
    (tmp_path / "m.jsonl").write_text('{"step": 1, "kind": "eval", "loss": 2.0}\n')
    with pytest.raises(ConfigError, match="no line with tokens_per_second"):
        facts.last_throughput(tmp_path / "m.jsonl")


def test_optional_libraries_are_named_found_or_not(facts):
    lines = facts.versions()
    assert any(line.startswith("torch 2") for line in lines)
    for name in ("apex", "flash_attn"):
        assert any(line.startswith(f"{name}: ") for line in lines)


def test_without_a_gpu_the_check_says_so_with_status_3(tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/bash\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "tools" / "gpu_check.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "No NVIDIA GPU here" in done.stderr
