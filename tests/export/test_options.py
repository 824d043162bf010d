import re

import pytest

from tide_mega.errors import ConfigError
from tide_mega.export.__main__ import main
from tide_mega.export.options import Choice, ExportOptions, choose


def chosen(**options: object) -> Choice:
    return choose(ExportOptions(run="runs/x", out="hf", **options))


def test_tables_are_stored_as_the_weights_unless_told_otherwise():
    assert chosen() == Choice("bf16", "bf16", None, "inline")
    assert chosen(dtype="fp32").tables == "fp32"
    assert chosen(tables="rank:.5", memory="sidecar") == Choice("bf16", "rank", 0.5, "sidecar")


def test_trained_tables_are_inline_and_not_quantised():
    assert chosen(dtype="fp32", tables="bf16").is_trained
    assert not chosen(tables="int8").is_trained
    assert not chosen(tables="bf16", memory="sidecar").is_trained


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dtype": "fp16"}, "dtype=fp16 is not known: use fp32 or bf16."),
        ({"memory": "disk"}, "memory=disk is not known: use inline or sidecar."),
        ({"tables": "int3"}, "tables=int3 is not known: use fp32, bf16, int8, int4, nf4 or rank:0.5, say."),
        ({"tables": "rank:1.5"}, "tables=rank:1.5 is not a part of the rank: use rank:p with 0 < p <= 1."),
        ({"tables": "rank:0"}, "is not a part of the rank"),
        ({"tables": "fp32"}, "tables=fp32 would be cast to dtype=bf16 whenever the weights are loaded: use"),
        ({"step": 0}, "step=0 is no step of a checkpoint: use 1 or more"),
        ({"license": " "}, "license=' ' is blank: leave it out."),
    ],
)
def test_what_cannot_be_meant_is_refused_in_a_sentence(options, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        chosen(**options)


def test_the_command_refuses_before_it_reads_anything():
    with pytest.raises(ConfigError, match="dtype=fp8 is not known"):
        main(["run=nowhere", "out=hf", "dtype=fp8"])
