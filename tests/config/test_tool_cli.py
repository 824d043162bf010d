from dataclasses import dataclass, field

import pytest
from omegaconf import MISSING

from tide_mega.config.help import describe
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
    note: str | None = "none"
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
        (["out=/x", f"limit={-(2**70)}"], f"limit={-(2**70)} has more than 64 bits: use a smaller one."),
        (["=1"], "'=1' is not key=value: the keys are out, inputs"),
        (
            ["out=/x", "inputs.x=1"],
            "Unknown key inputs.x: inputs has no keys of its own, give inputs=<value>.",
        ),
        (["out=/x", "sizes=[5"], "sizes=[5 cannot be read"),
        (["out=/x", "inputs=[a"], "inputs=[a cannot be read: the bracket is not closed"),
        (["out=/x", "inputs=a,,b"], "inputs=a,,b cannot be read: there is nothing between two commas"),
        (["out=null"], "out=null has the wrong type: it takes str."),
        (["out="], "out='' is blank: give a folder."),
        (["out= "], "out=' ' is blank: give a folder."),
        (["out=a\nb"], "out='a\\nb' has a line break or another control character: leave it out."),
        (
            ["out=" + "x" * 256],
            "out=" + "x" * 57 + "... has a name of 256 bytes, and a folder's has at most 255",
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(capsys, words, start):
    with pytest.raises(SystemExit) as leaving:
        parse(*words)
    assert leaving.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(start)
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "word",
    [
        "007",
        "2024_10_01",
        "1e-4",
        "true",
        "off",
        "~",
        "1:30",
        "0x10",
        "a: b",
        "a=b",
        "[a",
        "{a",
        "#a",
        "it's",
    ],
)
def test_text_is_taken_as_typed(word):
    assert parse(f"out={word}").out == word
    if word != "[a":
        assert parse("out=x", f"inputs=[a, {word}]").inputs == ["a", word]
    assert parse(f'out="{word}"', f"inputs='{word}'".replace("it's", "its")).out == word


def test_null_without_quotes_is_none_and_commas_in_quotes_are_text():
    parsed = parse("out='null'", "note=null", "inputs='a,b',c(1,2)")
    assert (parsed.out, parsed.note, parsed.inputs) == ("null", None, ["a,b", "c(1,2)"])


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
    assert keys == ["out", "inputs", "fraction", "overwrite", "limit", "note", "sizes", "nested.depth"]
