"""The decode benchmark through its command line: what it writes hangs together, and what it refuses."""

import json
import sys

import pytest

from tests.support.tools import tool_module

TINY = ["layers=1", "width=64", "ffn_width=64", "heads=2", "groups=1", "vocab=300", "rows=200", "prompt=100"]
TINY += ["context=4", "turns=3", "peers=[]"]


@pytest.fixture(scope="module")
def tool():
    with tool_module("bench_decode") as module:
        yield module


def test_table_and_json_agree(tool, tmp_path, capsys):
    out = tmp_path / "decode.json"
    words = ["blocks=2,3", "kinds=bf16,int4", "kinds_blocks=3", "batches=1,2", "disk=false", "int8=false"]
    assert tool.main([*TINY, *words, f"out={out}"]) == 0
    lines = json.loads(out.read_text())["lines"]
    names = ["K=0", "K=2 bf16", "K=3 bf16", "K=3 int4"]
    assert [(line["batch"], line["name"]) for line in lines] == [(b, name) for b in (1, 2) for name in names]
    for line in lines:
        assert line["cpu"] > 0 and line["wall"] > 0
        assert line["cpu_ratio"]["low"] <= line["cpu_ratio"]["median"] <= line["cpu_ratio"]["high"]
        if line["name"] == "K=0":
            assert line["cpu_ratio"]["median"] == line["wall_ratio"]["median"] == 1
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 3 + 8 and "K=3 int4" in shown[-1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_rows_on_disk_and_weights_in_8_bits(tool, tmp_path, capsys):
    out = tmp_path / "decode.json"
    assert tool.main([*TINY, "blocks=[]", "batches=1", f"folder={tmp_path}", f"out={out}"]) == 0
    found = json.loads(out.read_text())
    by_name = {line["name"]: line for line in found["lines"]}
    assert set(by_name) == {"K=0", "K=8 disk", "int8 weights"}
    assert 0 <= by_name["K=8 disk"]["hits"] <= 1
    assert found["cold"]["tokens"] == 100 and len(found["cold"]["seconds"]) == 5
    held = found["resident"]
    assert held["cache"] == 15 * 288 and 0.8 < held["tide"] / held["base"] < 1.2
    assert [path.name for path in tmp_path.iterdir()] == ["decode.json"]
    assert "cold prompt of 100" in capsys.readouterr().out


@pytest.mark.parametrize(
    "word",
    [
        "turns=0",
        "heads=3",
        "blocks=0",
        "batches=[]",
        "rows=301",
        "dtype=fp16",
        "kinds=rank",
        "peers=x",
        "cache=0",
    ],
)
def test_options_that_cannot_be_meant(tool, word, capsys):
    assert tool.main([*TINY, word]) == 2
    assert word.partition("=")[0] in capsys.readouterr().err or word == "rows=301"
