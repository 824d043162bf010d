"""The memory benchmark: what it computes, what it refuses, and one small run of real processes."""

import json
import sys

import pytest

from tests.support.tools import tool_module


@pytest.fixture(scope="module")
def tool():
    with tool_module("bench_memory") as module:
        yield module


def test_the_computed_figures_by_hand(tool):
    options = tool.BenchOptions(vocab=100, width=8, processes=2, micro_batch=3, seq_length=5)
    table, row = 100 * 2 * 8 * 4, 2 * 8 * 4  # bytes of all tables and of one type's rows, K = 2
    # weights, gradient and two moments; M of 15 tokens and its gradient
    assert tool.computed(options, "plain", 2, distinct=10) == 4 * table + 2 * 15 * row
    # fetched and normalised rows, and their gradient three times on its way
    rows = 2 * 10 * row + 3 * 10 * row
    # weights and gradient; master and two moments over two processes
    assert tool.computed(options, "tensor", 2, distinct=10) == 2 * table + 3 * table / 2 + rows
    assert tool.computed(options, "tensor_data", 2, distinct=10) == 4 * table / 2 + rows


def test_lines_compare_each_approach_with_plain_and_with_no_blocks(tool, monkeypatch):
    steps = {
        **{("plain", 0): 100, ("tensor", 0): 50},
        **{("plain", 8): 500, ("tensor", 8): 250, ("tensor_data", 8): 150},
    }
    monkeypatch.setattr(
        tool, "measure", lambda _, a, k: {"start": 10, "steps": steps[a, k] * 10**6, "distinct": 4}
    )
    lines = tool.bench(tool.BenchOptions())
    assert [(line["approach"], line["blocks"]) for line in lines] == list(steps)
    assert [line["times_less"] for line in lines] == [1, 2, 1, 2, pytest.approx(10 / 3)]
    assert [line.get("memory", 0) // 10**6 for line in lines] == [0, 0, 400, 200, 100]
    assert [line.get("memory_times_less") for line in lines] == [None, None, 1, 2, 4]
    shown = tool.show(lines).splitlines()
    assert shown[2].split() == ["0", "plain", "0", "100", "1.00", "-", "-", "-", "-"]
    assert shown[-1].split()[:7] == ["8", "tensor_data", "0", "150", "3.33", "100", "4.00"]
    assert len({len(line) for line in shown}) == 1


def test_the_table_is_printed_and_written(tool, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tool, "measure", lambda _, a, k: {"start": 1, "steps": 9 + k + len(a), "distinct": 4})
    out = tmp_path / "peaks.json"
    assert tool.main(["blocks=8,24", "vocab=64", f"out={out}"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3 + 2 + 2 * 3
    found = json.loads(out.read_text())
    assert found["options"]["blocks"] == [8, 24]
    assert [line["blocks"] for line in found["lines"]] == [0, 0, 8, 8, 8, 24, 24, 24]


@pytest.mark.slow
def test_real_processes_hold_what_their_approach_says(tool):
    options = tool.BenchOptions(vocab=16_384, width=128, layers=1, micro_batch=1, seq_length=64, steps=2)
    plain, owned = (tool.measure(options, approach, 16) for approach in ("plain", "tensor_data"))
    tables = 16_384 * 16 * 128 * 4
    # Weights, gradients and two moments: of all rows, or of half of them.
    assert plain["steps"] > 3.9 * tables
    assert 1.9 * tables < owned["steps"] < 0.9 * plain["steps"]
    assert 0 < owned["distinct"] == plain["distinct"] <= 64


def test_a_failing_process_ends_the_others_and_says_why(tool, tmp_path, monkeypatch):
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, sys, time\n"
        "if json.loads(sys.argv[1])['rank'] == 1: sys.exit('no room left')\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(tool, "_WORKER", worker)
    with pytest.raises(RuntimeError, match=r"plain with K=8: process 1 ended with status 1\nno room left"):
        tool.measure(tool.BenchOptions(), "plain", 8)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("processes=0", "processes=0 is too small: give 1 or more"),
        ("blocks=0,8", "blocks=[0, 8] has a K below 1: leave it out, K=0 is always measured"),
        ("width=20", "width=20 does not divide into 4 heads of an even size: use a multiple of 8"),
        ("out=/nowhere/peaks.json", "lies in a folder that does not exist: make the folder first"),
    ],
)
def test_a_wrong_option_is_one_sentence_and_status_2(tool, capsys, word, message):
    assert tool.main([word]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "linux", reason="where Linux is absent")
def test_another_system_is_refused(tool, capsys):
    assert tool.main([]) == 2
    assert "on Linux" in capsys.readouterr().err
