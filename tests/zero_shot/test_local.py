"""JSONL files are checked before use, and tasks without a file are named."""

import json

import pytest

from tide_mega.errors import ConfigError
from tide_mega.lab.zero_shot.harness import DEFINITIONS, FILES, find_files

GOOD = {"query": "Question: two?", "choices": ["a", "b"], "gold": 1}


def write(folder, name, *examples):
    lines = [example if isinstance(example, str) else json.dumps(example) for example in examples]
    (folder / name).write_text("\n".join(lines) + "\n")


def test_files_are_found_and_the_others_named_with_what_they_need(tmp_path):
    write(tmp_path, "arc_easy.jsonl", GOOD, "")
    write(tmp_path, "lambada_openai.jsonl", {"context": "", "continuation": "word"})
    files, absent = find_files(tmp_path, ["arc_easy", "piqa", "sciq", "lambada_openai"])
    assert files == {name: tmp_path / f"{name}.jsonl" for name in ("arc_easy", "lambada_openai")}
    assert absent == {
        "piqa": "needs the hub, or piqa.jsonl in the folder of local=",
        "sciq": "needs the hub: it has no local version (leave out local=)",
    }


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 is a JSON list, not an object"),
        ({**GOOD, "query": 3}, "line 2 has no text under 'query'"),
        ({**GOOD, "choices": "ab"}, "line 2 has no list of texts under 'choices'"),
        ({**GOOD, "choices": []}, "line 2 has no list of texts under 'choices'"),
        ({**GOOD, "gold": 2}, "line 2 has gold=2, which is no index of its 2 choices"),
        ({**GOOD, "gold": True}, "line 2 has gold=True"),
        ({**GOOD, "gold": "b"}, "line 2 has gold='b'"),
    ],
)
def test_a_line_that_is_no_example_is_named(tmp_path, line, problem):
    write(tmp_path, "piqa.jsonl", GOOD, line)
    with pytest.raises(ConfigError) as caught:
        find_files(tmp_path, ["piqa"])
    assert f"piqa.jsonl {problem}" in str(caught.value)


def test_a_mark_before_the_first_line_and_blank_lines_are_no_examples(tmp_path):
    lines = b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n \r\n" + json.dumps(GOOD).encode()
    (tmp_path / "piqa.jsonl").write_bytes(lines)
    files, _ = find_files(tmp_path, ["piqa"])
    assert list(files) == ["piqa"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"query": "\xff"}', "is not UTF-8: byte 0xff"),
        (b'{"query": "\\ud800", "choices": ["a"], "gold": 0}', "lone surrogate"),
        (b'{"query": "a", "choices": ["\\ud800"], "gold": 0}', "has no list of texts under 'choices'"),
        (b"[" * 10**5, "nested too deeply"),
        (b"9" * 5000, "is not JSON that can be read"),
    ],
)
def test_what_no_reader_could_read_is_named_too(tmp_path, line, problem):
    (tmp_path / "piqa.jsonl").write_bytes(line)
    with pytest.raises(ConfigError, match=f"piqa.jsonl line 1 .*{problem}"):
        find_files(tmp_path, ["piqa"])


def test_an_open_task_needs_a_continuation(tmp_path):
    write(tmp_path, "lambada_openai.jsonl", {"context": "a", "continuation": ""})
    with pytest.raises(ConfigError, match="line 1 has an empty continuation"):
        find_files(tmp_path, ["lambada_openai"])


def test_an_empty_file_and_no_folder_are_refused(tmp_path):
    write(tmp_path, "boolq.jsonl", "")
    with pytest.raises(ConfigError, match="has no example"):
        find_files(tmp_path, ["boolq"])
    with pytest.raises(ConfigError, match="is not a folder"):
        find_files(tmp_path / "boolq.jsonl", ["boolq"])


def test_every_local_task_has_its_definition():
    assert {path.stem for path in DEFINITIONS.glob("*.yaml")} == set(FILES)
