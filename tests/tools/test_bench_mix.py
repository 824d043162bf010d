"""The mix benchmark through its command line: what it writes hangs together, and what it refuses."""

import json
import sys

import pytest

from tests.support.tools import tool_module

TINY = ["tokens=64", "width=16", "vocab=90", "repeats=2", "threads=1", "bandwidth_mb=1", "device=cpu"]


@pytest.fixture(scope="module")
def tool():
    with tool_module("bench_mix") as module:
        yield module


def test_table_json_and_figure_agree(tool, tmp_path, capsys):
    out, plot = tmp_path / "mix.json", tmp_path / "mix.png"
    words = [*TINY, "blocks=2,5", "layers=1,3", "peaks=false", f"out={out}", f"plot={plot}"]
    assert tool.main(words) == 0
    found = json.loads(out.read_text())
    assert [(x["blocks"], x["layers"], x["version"]) for x in found["lines"]] == [
        (k, layers, version) for k in (2, 5) for layers in (1, 3) for version in ("autograd", "cpu")
    ]
    for base, fused in zip(found["lines"][::2], found["lines"][1::2], strict=True):
        medians = [x["seconds"]["total"]["median"] for x in (base, fused)]
        assert fused["times_faster"] == pytest.approx(medians[0] / medians[1])
        assert fused["floor_seconds"]["forward"] * found["bandwidth"] == pytest.approx(
            fused["floor_bytes"]["forward"]
        )
        assert max(base["error"], fused["error"]) < 1e-5
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 3 + 8
    # K, layers, types, version; then times, of which the last are the ratio and the floor
    cells = shown[4].split()
    assert cells[:4] == ["2", "1", str(found["lines"][1]["rows"]), "cpu"]
    assert f"{found['lines'][1]['times_faster']:.2f}" in cells
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_versions_and_dtype_are_as_asked(tool, tmp_path):
    out = tmp_path / "mix.json"
    words = [*TINY, "versions=naive,cpu", "layers=1", "dtype=bf16", "peaks=false", f"out={out}"]
    assert tool.main(words) == 0
    lines = json.loads(out.read_text())["lines"]
    assert [line["version"] for line in lines] == ["autograd", "naive", "cpu"]
    assert {line["dtype"] for line in lines} == {"bf16"}
    assert max(line["error"] for line in lines) < 0.05


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_memory_of_fresh_processes_is_what_each_version_must_hold(tool, tmp_path):
    out = tmp_path / "mix.json"
    words = [*TINY, "tokens=2048", "width=256", "vocab=200", "layers=1", f"out={out}"]
    assert tool.main(words) == 0
    base, fused = json.loads(out.read_text())["lines"]
    # autograd keeps [N, K, D] for its backward pass and makes its gradient, the other needs neither
    copies = 2048 * 8 * 256 * 4
    assert base["peak"] > 2 * copies > copies > fused["peak"] > 2048 * 256 * 4
    assert fused["times_less"] == pytest.approx(base["peak"] / fused["peak"])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("tokens=0", "tokens=0 is too small: give 1 or more"),
        ("blocks=0,8", "blocks=[0, 8] is not a list of numbers from 1"),
        ("dtype=fp16", "dtype=fp16 is unknown: use auto, bf16, fp32"),
        ("distribution=normal", "distribution=normal is unknown: use zipf, uniform, one"),
        ("versions=cuda", "versions=cuda is unknown: use naive, cpu, triton"),
        ("out=/nowhere/mix.json", "lies in a folder that does not exist: make the folder first"),
    ],
)
def test_a_wrong_option_is_one_sentence_and_status_2(tool, capsys, word, message):
    assert tool.main([word]) == 2
    assert message in capsys.readouterr().err
