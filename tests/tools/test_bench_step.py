"""The step benchmark through its command line: what it writes hangs together, and what it refuses."""

import json
import sys

import pytest

from tests.support.slow import quick_and_slow
from tests.support.tools import tool_module
from tide_mega.config.schema import MemoryConfig
from tide_mega.config.sizes import flops_per_token

TINY = ["layers=1", "micro_batch=2", "seq_length=16", "steps=2", "warmup=1", "op_repeats=2", "threads=1"]
TINY += ["bandwidth_mb=1", "device=cpu", "peaks=false", "overrides=model.vocab_size=512"]


@pytest.fixture(scope="module")
def tool():
    with tool_module("bench_step") as module:
        yield module


@pytest.mark.parametrize("precision", quick_and_slow(["fp32"], ["fp32", "bf16"]))
def test_table_json_and_figure_agree(tool, tmp_path, capsys, precision):
    out, plot = tmp_path / "step.json", tmp_path / "step.png"
    words = [*TINY, f"precision={precision}", "blocks=3", "accumulation=2", f"out={out}", f"plot={plot}"]
    assert tool.main(words) == 0
    found = json.loads(out.read_text())
    base, tide = found["lines"]
    assert (base["blocks"], tide["blocks"]) == (0, 3)
    config = tool.StepOptions(layers=1, overrides=["model.vocab_size=512"]).configuration("demo", 3, "fp32")
    for line, blocks in ((base, 0), (tide, 3)):
        step = line["seconds"]["total"]["median"]
        assert line["tokens_per_second"] == pytest.approx(2 * 2 * 16 / step)
        flops = flops_per_token(config.model, MemoryConfig(blocks), 16)
        rate = found["peak_tflops"] * 1e12
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] * flops / rate)
    medians = [line["seconds"]["total"]["median"] for line in (base, tide)]
    assert tide["overhead"] == pytest.approx(medians[1] / medians[0] - 1)
    assert tide["added"]["total"] == pytest.approx(medians[1] - medians[0])
    parts = tide["breakdown"]
    assert sum(part["seconds"] for part in parts.values()) == pytest.approx(tide["added"]["total"])
    floors = sum(part["floor"] for part in parts.values() if part["floor"] is not None)
    assert floors == pytest.approx(sum(tide["floor_bytes"].values()) / found["bandwidth"])
    assert all(
        part["seconds"] > 0
        for name, part in parts.items()
        if name not in ("other", "tables' AdamW", "mix forward")
    )
    shown = capsys.readouterr().out
    assert f"{tide['overhead']:+.2%}" in shown and "router backward" in shown
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_tables_owned_outside_the_model_are_measured_too(tool, tmp_path):
    out = tmp_path / "step.json"
    words = [
        *TINY[:-1],
        "overrides=model.vocab_size=512,memory.owners=tensor_data",
        "blocks=0,2",
        f"out={out}",
    ]
    assert tool.main(words) == 0
    parts = json.loads(out.read_text())["lines"][1]["breakdown"]
    assert parts["gather and norm"]["seconds"] > 0 and parts["norm backward"]["seconds"] > 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_memory_of_a_fresh_process_counts_weights_gradients_and_moments(tool, tmp_path):
    out = tmp_path / "step.json"
    words = [word for word in TINY if not word.startswith(("peaks", "overrides", "op_repeats"))]
    words += ["op_repeats=0", "overrides=model.vocab_size=8192", "precision=fp32", "blocks=8", f"out={out}"]
    assert tool.main(words) == 0
    base, tide = json.loads(out.read_text())["lines"]
    tables = 8192 * 8 * 128 * 4
    assert tide["peak"] - base["peak"] > 3.9 * tables
    assert "breakdown" not in tide


def test_a_prediction_needs_no_gpu_and_names_the_largest_term(tool, tmp_path, capsys):
    out, plot = tmp_path / "step.json", tmp_path / "step.png"
    words = ["predict=true", "gpu=h200", "model=1b", "blocks=2,24", f"out={out}", f"plot={plot}"]
    assert tool.main(words) == 0
    found = json.loads(out.read_text())
    assert [(x["accumulation"], x["blocks"]) for x in found["lines"]] == [(1, 2), (1, 24), (8, 2), (8, 24)]
    for line in found["lines"]:
        assert line["overhead"] == pytest.approx(sum(line["seconds"].values()) / line["base_seconds"])
        assert line["tokens"] == 8 * 2048
        # 7.47 GFLOP a token of the 1b at 55 % of 989 TFLOP/s
        per_step = line["base_seconds"] / line["accumulation"]
        assert per_step == pytest.approx(8 * 2048 * 7.47e9 / (0.55 * 989e12), rel=0.01)
        assert line["seconds"][line["dominating"]] == max(line["seconds"].values())
    assert found["lines"][0]["overhead"] < found["lines"][1]["overhead"]
    assert "4.8 TB/s" in capsys.readouterr().out
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_auto_takes_the_largest_model_that_fits_every_k(tool):
    options = tool.StepOptions(blocks=[0, 8])
    assert tool.largest_model(options, "bf16", 80 * 10**9) == "1b"
    assert tool.largest_model(tool.StepOptions(blocks=[0, 24]), "bf16", 80 * 10**9) == "350m"
    with pytest.raises(
        tool.ConfigError, match=r"No paper model with K=8 fits 1\.0 GB: give a smaller K or layers"
    ):
        tool.largest_model(options, "bf16", 10**9)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("steps=0", "steps=0 is too small: give 1 or more"),
        ("blocks=-1", "blocks=[-1] is not a list of numbers from 0"),
        ("mfu=1.5", "mfu=1.5 is not a share: give more than 0 and at most 1"),
        ("gpu=v100", "gpu=v100 is unknown: use GB300, B300, GB200, B200, H200 NVL, H200"),
        ("warmup=-1", "warmup=-1 is negative: give 0 or more"),
        ("plot=/nowhere/a.png", "lies in a folder that does not exist: make the folder first"),
        ("overrides=memory.banks=3", "memory.banks"),
    ],
)
def test_a_wrong_option_is_one_sentence_and_status_2(tool, capsys, word, message):
    assert tool.main([word, "bandwidth_mb=1"]) == 2
    assert message in capsys.readouterr().err


def test_auto_without_a_gpu_is_refused(tool, capsys):
    assert tool.main(["model=auto", "device=cpu"]) == 2
    assert "needs a GPU to fit: name a model" in capsys.readouterr().err


@pytest.mark.parametrize("blocks", [0, 2, 3, 8, 24, 40])
def test_steps_are_those_of_the_presets(tool, blocks):
    config = tool.StepOptions().configuration("demo", blocks, "fp32")
    assert config.memory.num_blocks == blocks
    assert config.memory.owners == ("tensor_data" if blocks else "tensor")
