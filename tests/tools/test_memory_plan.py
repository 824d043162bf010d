"""The plan of the memory's traffic, from text to table."""

import json

import numpy as np
import pytest

from tests.support.tools import tool_module
from tide_mega.data.index import DatasetIndex
from tide_mega.data.stream import TokenStream
from tide_mega.data.tokenizer import load_tokenizer
from tide_mega.memory.distinct import PlanOptions

SMALL = ["seq_length=8", "tokens=8,16", "memory_tokens=16", "blocks=2", "width=4", "data=4", "micro_batch=2"]


@pytest.fixture(scope="module")
def tool():
    with tool_module("memory_plan") as module:
        yield module


@pytest.fixture
def status(tool, capsys):
    """Run the tool; returns (status, stdout, stderr)."""

    def run(*words):
        try:
            code = tool.main(list(words))
        except SystemExit as stopped:
            code = stopped.code
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


def test_a_prepared_dataset_is_read_as_it_was_tokenised(status, tiny_data, tmp_path):
    out = tmp_path / "plan.json"
    code, _, error = status(f"text={tiny_data}", "order=contiguous", "most_steps=3", *SMALL, f"out={out}")
    assert (code, error) == (0, "")
    found = json.loads(out.read_text())
    vocab = DatasetIndex.load(tiny_data).tokenizer.vocab_size
    stream = TokenStream.open(tiny_data, "train", 8).tokens(0, 48)
    types = [len(np.unique(stream[i : i + 16])) for i in (0, 16, 32)]
    assert found["types"][1]["mean"] == pytest.approx(sum(types) / 3)
    assert found["types"][1]["most"] == max(types)
    traffic = found["traffic"][1]
    assert traffic["dense_bytes"] == 3 / 4 * vocab * 2 * 4 * 4
    assert traffic["exchange_bytes"] == pytest.approx(3 / 4 * sum(types) / 3 * (8 + 2 * 4 * 4))
    assert traffic["times_fewer"] == pytest.approx(traffic["dense_bytes"] / traffic["exchange_bytes"])
    assert {line["approach"]: line["bytes"]["M"] for line in found["memory"] if "M" in line["bytes"]} == {
        "plain": 16 * 8 * 2
    }


def test_text_is_tokenised_with_an_eos_after_each_document(tool, tiny_data, tmp_path):
    tokenizer_path = tiny_data / DatasetIndex.load(tiny_data).tokenizer.file
    tokenizer = load_tokenizer(tokenizer_path)
    texts = ["one document and another one", "a second document " * 20]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = PlanOptions(
        text=[str(tmp_path)],
        tokenizer=str(tokenizer_path),
        seq_length=8,
        tokens=[8],
        order="contiguous",
        memory_tokens=8,
    )
    ids = np.concatenate([[*tokenizer.encode_batch([text])[0], tokenizer.eos_id] for text in texts])
    ids = ids[: len(ids) // 8 * 8].reshape(-1, 8)[:32]
    found = tool.plan(options)
    assert found["types"][0]["mean"] == pytest.approx(np.mean([len(np.unique(row)) for row in ids]))
    assert found["options"]["vocab"] == tokenizer.vocab_size


def test_the_tables_have_a_line_for_every_case(status, tiny_data):
    code, shown, _ = status(f"text={tiny_data}", *SMALL, "blocks=2,3", "pipeline=2", "tensor=2")
    assert code == 0
    tables = shown.split("\n\n")
    assert [len(table.splitlines()) - 3 for table in tables] == [2, 4, 2, 4]
    for table in tables:
        assert len({len(line) for line in table.splitlines()[1:]}) == 1


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("tokens=12", "tokens=12 is no whole number of sequences: give multiples of seq_length=8"),
        ("memory_tokens=32", "memory_tokens=32 is not among tokens: use one of 8, 16"),
        ("blocks=0", "blocks=[0] leaves nothing to plan"),
        ("data=0", "data=0 is too small"),
        ("order=random", "order=random is unknown: use shuffled or contiguous"),
        ("gigabits=0", "gigabits=0.0 is no rate"),
        ("vocab=3", "vocab=3 has no row for token id"),
        ("out=/nowhere/plan.json", "out=/nowhere/plan.json lies in a folder that does not exist"),
        ("max_document_bytes=0", "max_document_bytes=0 is too small"),
        ("text=/nowhere", "/nowhere, which is neither a file nor a folder"),
        ("tokenizer=/nowhere.json", ""),
    ],
)
def test_a_wrong_option_is_one_sentence_and_status_2(status, tiny_data, word, message):
    tokenizer = tiny_data / DatasetIndex.load(tiny_data).tokenizer.file
    text = tokenizer if word.startswith("tokenizer=") else tiny_data
    words = [f"text={text}", f"tokenizer={tokenizer}", *SMALL, word]
    code, _, error = status(*words)
    assert code == 2
    assert message in error and "Traceback" not in error


def test_text_too_short_for_a_step_is_status_1(status, tiny_data):
    code, _, error = status(f"text={tiny_data}", *SMALL, "tokens=8000000", "memory_tokens=8000000")
    assert code == 1
    assert "fewer than the 1000000 of a step of 8,000,000 tokens; give more text" in error


def test_without_the_package_of_the_tokenizer_a_file_is_asked_for(tool, monkeypatch, tmp_path, status):
    (tmp_path / "a.txt").write_text("some text")
    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda name: None)
    code, _, error = status(f"text={tmp_path}", *SMALL)
    assert code == 2
    assert "tokenizer=null needs the package llama_models, which is absent: give a tokenizer's file" in error


def test_help_names_every_option(status):
    code, shown, _ = status("--help")
    assert code == 0
    for name in PlanOptions.__dataclass_fields__:
        assert f"\n  {name} (" in shown
