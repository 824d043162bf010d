"""The GPU kernels compiled ahead of time: figures without a GPU, and faults that are found."""

import json
import os
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.tools import tool_module

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton compiles on Linux")


@pytest.fixture(scope="module")
def tool():
    with tool_module("compile_kernels") as module:
        yield module


@pytest.fixture(scope="module")
def aot(tmp_path_factory):
    if "TRITON_INTERPRET" in os.environ:
        pytest.skip("the interpreter compiles nothing")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        from tide_mega.kernels import aot

        yield aot


@pytest.mark.slow
def test_every_kernel_compiles_for_both_architectures_without_a_fault(tool, aot, tmp_path, capsys):
    out = tmp_path / "kernels.json"
    assert tool.main(["blocks=8", "width=2048", "dtype=bf16", f"out={out}"]) == 0
    found = json.loads(out.read_text())["kernels"]
    assert {(k["kernel"], k["arch"]) for k in found} == {
        (kernel, arch) for kernel in aot.KERNELS for arch in ("sm_90", "sm_100")
    }
    for kernel in found:
        assert kernel["spill_bytes"] == 0 and 16 <= kernel["registers"] <= 255, kernel
        assert kernel["occupancy"] >= 0.25 and kernel["widest_load"] == 128, kernel
    shown = capsys.readouterr().out
    assert "18 kernels compiled, 0 with a fault" in shown


@pytest.mark.slow
def test_a_width_that_is_no_power_of_two_and_many_blocks_compile(tool, aot, capsys):
    assert (
        tool.main(
            [
                "blocks=[24]",
                "width=1536",
                "arch=sm_90",
                "kernel=mix_backward,row_gradient,norm_router_backward",
            ]
        )
        == 0
    )
    assert "6 kernels compiled, 0 with a fault" in capsys.readouterr().out


def test_the_row_gradient_of_many_blocks_spills_at_no_width(tool, aot, capsys):
    # With one stage more it spills on sm_90 under triton 3.7 and 3.8, which torch 2.13 and 2.14 for CUDA bring.
    words = ["kernel=row_gradient", "arch=sm_90", "blocks=[17,24]", "dtype=bf16"]
    assert tool.main(words) == 0
    assert "8 kernels compiled, 0 with a fault" in capsys.readouterr().out


def test_the_widths_of_all_paper_models_are_compiled_by_default(tool):
    models = (Path(__file__).parents[2] / "conf" / "model").glob("*.yaml")
    widths = {yaml.safe_load(path.read_text())["hidden_size"] for path in models if path.stem != "demo"}
    assert set(tool.CompileOptions().width) == widths


def test_a_tile_too_large_spills_and_is_a_fault(tool, aot, monkeypatch, capsys):
    entry = tool.find("mix_backward", "sm_90", 24, 2048)
    too_large = type(entry)(**{**vars(entry), "tile": type(entry.tile)(8, 128, 4, 1)})
    monkeypatch.setattr(tool, "find", lambda *_: too_large)
    assert tool.main(["kernel=mix_backward", "arch=sm_90", "blocks=24", "width=2048", "dtype=bf16"]) == 1
    assert "bytes a thread" in capsys.readouterr().out


def test_loads_of_single_values_are_seen(aot):
    ptx = """
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    ld.global.b16 { %rs1 }, [ %rd2 + 0 ];
    ld.global.L1::evict_first.v2.b64 { %rd3, %rd4 }, [ %rd5 + 0 ];
    @%p2 cp.async.cg.shared.global [ %r5 + 0 ], [ %rd6 + 0 ], 0x10, %r6;
    cp.async.ca.shared.global [ %r7 + 0 ], [ %rd7 + 0 ], 0x4, %r8;
    st.global.v4.b32 [ %rd8 + 0 ], { %r1, %r2, %r3, %r4 };
    """
    assert sorted(aot.load_widths(ptx)) == [16, 32, 128, 128, 128]


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "expected"),
    [(32, 0, 4, 1.0), (33, 0, 4, 48 / 64), (255, 0, 8, 8 / 64), (32, 100 * 1024, 4, 8 / 64), (16, 0, 1, 0.5)],
)
def test_occupancy_follows_the_scarcest_resource(aot, registers, shared, warps, expected):
    assert aot.occupancy(registers, shared, warps) == expected


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("arch=sm_80", "arch=sm_80 is unknown: use sm_90, sm_100."),
        ("kernel=mix", "kernel=mix is unknown: use mix_forward,"),
        ("blocks=0", "blocks=0 is too small: give 1 or more."),
        ("out=/nowhere/at/all.json", "lies in a folder that does not exist"),
    ],
)
def test_a_wrong_option_is_refused_in_one_sentence(tool, capsys, word, sentence):
    assert tool.main([word]) == 2
    assert sentence in capsys.readouterr().err


def test_help_shows_every_option(tool, capsys):
    with pytest.raises(SystemExit) as stopped:
        tool.main(["--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and all(
        key in shown for key in ("arch", "kernel", "blocks", "dtype", "out")
    )
