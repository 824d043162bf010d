"""The benchmark of live diagnostics through its command line: its figures hang together, and what it refuses."""

import json

import pytest

from tests.support.tools import tool_module

TINY = ["layers=1", "micro_batch=2", "seq_length=16", "threads=1", "device=cpu", "precision=fp32"]
TINY += ["rounds=2", "every=3", "warmup=1", "wandb=false", "eval_every=50"]


@pytest.fixture(scope="module")
def tool():
    with tool_module("bench_live") as module:
        yield module


@pytest.mark.parametrize("words", [["blocks=2"], ["blocks=0"], ["blocks=2", "accumulation=2"]], ids=" ".join)
def test_shares_are_those_of_the_items(tool, tmp_path, capsys, words):
    out = tmp_path / "live.json"
    overrides = "overrides=model.vocab_size=512,memory.owners=tensor"
    assert tool.main([*TINY, *words, overrides, f"out={out}"]) == 0
    found = json.loads(out.read_text())
    names = ["loss by decile", "null weight by layer and decile", "memory, means over ranks", "writing"]
    names += ["norms and distances of weights", "writing of these"]
    if "blocks=0" not in words:
        names[1:1] = ["recording of router weights", "gradient norm of each table"]
    assert set(found["items"]) == set(names)
    seconds = {name: item["median"] for name, item in found["items"].items()}
    logged = sum(seconds[name] for name in names[1:-2])
    evaluated = sum(seconds[name] for name in names[-2:])
    for every, share in found["shares"].items():
        extra = seconds["loss by decile"] + logged / int(every) + evaluated / 50
        assert share == pytest.approx(extra / found["step"]["median"])
    assert found["ratio"]["low"] <= found["ratio"]["median"] <= found["ratio"]["high"]
    shown = capsys.readouterr().out
    assert f"{found['shares']['10']:.3%} at logging.every=10" in shown and "every 50 steps" in shown


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("rounds=0", "rounds=0 is too small: give 1 or more"),
        ("blocks=-1", "blocks=-1 is negative"),
        ("cadences=[]", "cadences=[] is not a list of numbers from 1"),
        ("device=tpu", "device=tpu is unknown: use auto, cpu, cuda"),
        ("out=/nowhere/a.json", "lies in a folder that does not exist"),
        ("overrides=memory.banks=3", "memory.banks"),
    ],
)
def test_a_wrong_option_is_one_sentence_and_status_2(tool, capsys, word, message):
    assert tool.main([word]) == 2
    assert message in capsys.readouterr().err
