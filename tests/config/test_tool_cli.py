from dataclasses import dataclass, field

import pytest
from omegaconf import MISSING

from tide_mega.config.describe import describe
from tide_mega.config.hydra_door import parse_tool_cli


@dataclass
class Nested:
    depth: int = 3
    """How deep
    it goes."""


@dataclass
class Options:
    """A tool's options."""

    out: str = MISSING
    """Folder to write."""
    inputs: list[str] = field(default_factory=lambda: ["stdlib"])
    fraction: float = 0.01
    """Share held out."""
    overwrite: bool = False
    limit: int | None = None
    sizes: list[int] | None = None
    nested: Nested = field(default_factory=Nested)


def parse(*words):
    return parse_tool_cli(Options, list(words), doc="Do the thing.")


def test_values_are_converted_to_the_fields_types():
    options = parse(
        "out=/x", "inputs=[a,b.txt]", "fraction=1e-2", "overwrite=true", "limit=5", "nested.depth=4"
    )
    assert options == Options("/x", ["a", "b.txt"], 0.01, True, 5, nested=Nested(4))
    assert type(options) is Options and type(options.inputs) is list


def test_defaults_hold_where_nothing_is_given():
    assert parse("out=/x") == Options("/x")


def test_a_list_may_be_written_without_brackets():
    options = parse("out=/x", "inputs=a,b.txt", "sizes=8,24")
    assert (options.inputs, options.sizes) == (["a", "b.txt"], [8, 24])
    assert (parse("out=/x", "inputs=a").inputs, parse("out=/x", "sizes=null").sizes) == (["a"], None)


@pytest.mark.parametrize(
    ("words", "start"),
    [
        (["out=/x", "fractoin=1"], "Unknown key fractoin: did you mean fraction?"),
        (["out=/x", "zebra=1"], "Unknown key zebra: known keys are out, inputs, fraction"),
        (["out=/x", "limit=many"], "limit=many has the wrong type: it takes int or null."),
        (["fraction=0.1"], "out is not set: give out=<value>, or see --help."),
        (["out"], "'out' is not key=value: the keys are out, inputs"),
        (["out=/x", "sizes=5,many"], "sizes=many has the wrong type: it takes list[int] or null."),
        (["out=[a"], "out=[a cannot be read"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(capsys, words, start):
    with pytest.raises(SystemExit) as leaving:
        parse(*words)
    assert leaving.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(start)
    assert err.count("\n") == 1


def test_help_says_what_every_field_is(capsys):
    with pytest.raises(SystemExit) as leaving:
        parse("--help")
    assert leaving.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("Do the thing.")
    assert "out (str, required)\n      Folder to write." in out
    assert "inputs (list[str], default [stdlib])" in out
    assert "overwrite (bool, default false)" in out
    assert "limit (int | None, default null)" in out
    assert "nested.depth (int, default 3)\n      How deep it goes." in out


def test_describe_lists_leaves_in_order():
    keys = [entry.key for entry in describe(Options)]
    assert keys == ["out", "inputs", "fraction", "overwrite", "limit", "sizes", "nested.depth"]
