"""The benchmark of the memory's rows through its command line: its tables hang together, and what it refuses."""

import json

import numpy as np
import pytest

from tests.support.tools import tool_module

TINY = [
    "width=32", "rows=300", "repeats=2", "disk_rows=300", "reads=20", "prompt=50", "prompts=2", "vocab=200",
]  # fmt: skip


@pytest.fixture(scope="module")
def tool():
    with tool_module("bench_rows") as module:
        yield module


def test_tables_and_json_agree(tool, tmp_path, capsys):
    np.save(tmp_path / "ids.npy", np.array([5, 5, 6, 5, 7, 199], np.uint16))
    words = [*TINY, "blocks=2,3", "batch=1", f"tokens={tmp_path / 'ids.npy'}", "cache=0.005,0.01,1.0"]
    assert tool.main([*words, f"folder={tmp_path}", f"out={tmp_path / 'rows.json'}"]) == 0
    found = json.loads((tmp_path / "rows.json").read_text())
    kinds = ["bf16", "trained", "int8", "int4", "nf4"]
    assert [(line["blocks"], line["kind"]) for line in found["lookups"]] == [
        (K, kind) for K in (2, 3) for kind in kinds
    ]
    for line in found["lookups"]:
        assert 0 < line["p10"] <= line["p50"] <= line["p95"]
    assert found["lookups"][0]["ratio"] == 1
    assert set(found["single_reads"]) == {"cold", "page cache", "own cache"}
    assert set(found["prompts"]) == {"1", "4", "16"}
    # 5 again at once; 5 after 6 too, if two rows are kept.
    assert found["hits"] == pytest.approx({"0.005": 1 / 6, "0.01": 2 / 6, "1.0": 2 / 6})
    shown = capsys.readouterr().out
    assert "6 tokens of a vocabulary of 200" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.npy", "rows.json"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("formats=int3", "formats"),
        ("disk_format=trained", "disk_format"),
        ("dtype=fp8", "dtype"),
        ("blocks=0", "blocks"),
        ("reads=301", "is more than disk_rows"),
        ("repeats=1", "repeats"),
        ("width=0", "width"),
        ("cache=2.0", "cache"),
        ("tokens=nothing.npy", "cannot be read"),
        ("folder=nothing", "folder"),
        ("out=nothing/a.json", "out"),
    ],
)
def test_refusals(tool, capsys, word, message):
    assert tool.main([*TINY, word]) == 2
    assert message in capsys.readouterr().err


def test_ids_beyond_the_vocabulary(tool, tmp_path, capsys):
    np.save(tmp_path / "ids.npy", np.array([200]))
    assert tool.main([*TINY, f"tokens={tmp_path / 'ids.npy'}"]) == 2
    assert "does not hold ids of vocab=200" in capsys.readouterr().err
