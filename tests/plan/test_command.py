"""The command as people call it."""

import json

import pytest

from tide_mega.plan.__main__ import main

pytestmark = pytest.mark.fake_cuda
SMALL = [
    "experiment=demo_tide",
    "memory=k2",
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.ffn_hidden_size=256",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.vocab_size=640",
    "data.seq_length=64",
    "trainer.precision=bf16",
    "trainer.global_batch_size=16",
    "trainer.micro_batch_size=2",
    "parallel.pipeline=2",
]


def test_a_plan_is_printed_and_written(tmp_path, capsys):
    assert main([*SMALL, "gpus=4", f"out={tmp_path / 'plan'}", "network_gbs=25"]) == 0
    text = capsys.readouterr().out
    assert "4 x H100; tensor 1, pipeline 2, data 2, ZeRO-1; 4 micro-batches of 2 x 64 tokens a step" in text
    assert (tmp_path / "plan" / "plan.txt").read_text().strip() in text
    assert (tmp_path / "plan" / "plan.png").read_bytes().startswith(b"\x89PNG")
    plan = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert [rank["stage"] for rank in plan["ranks"]] == [0, 1]
    assert plan["assumed"]["network_gbs"] == 25
    sent = [c for c in plan["ranks"][0]["collectives"] if c["name"] == "send"]
    state = 64 * 2 * 64 * 2
    assert [(c["phase"], c["count"], c["bytes"]) for c in sent] == [("forward", 4, 4 * state)]
    assert sum(plan["step"]["parts"].values()) == pytest.approx(plan["step"]["seconds"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nodes=0"], "nodes=0 is too small"),
        (["gpu=v100"], "gpu=v100 is not known"),
        (["ranks=[4]", "gpus=4"], "ranks=4 is none of the job's"),
        (["gpus=3"], "parallel.pipeline=2"),
        (["model.layers=3"], "model.layers"),
    ],
)
def test_mistakes_are_one_sentence(words, said):
    from tide_mega.errors import ConfigError

    with pytest.raises(ConfigError, match=said):
        main([*SMALL, *words])
