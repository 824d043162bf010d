"""A tokenizer that ends what loads it ends a child alone. What does so here is a stand-in for the loader."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tokenizers

from tide_mega.data import tokenizer as trial
from tide_mega.data.index import DatasetIndex
from tide_mega.data.prepare.options import PrepareOptions
from tide_mega.data.prepare.vocabulary import dataset_tokenizer
from tide_mega.data.tokenizer import MOST_TYPES, load_tokenizer
from tide_mega.errors import ConfigError, DataError

LOADER = """
import json, os, sys
sys.path[:] = json.loads(sys.argv[1])
from tide_mega.data import tokenizer
from tide_mega.errors import ConfigError

def stand_in(path, eos_token):
    {act}

tokenizer.load_untried = stand_in
tokenizer.try_here(*json.loads(sys.argv[2]))
"""


@pytest.fixture(autouse=True)
def nothing_passed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(trial, "_passed", set())
    yield


def tokenizer_file(folder: Path, vocabulary: dict[str, int]) -> Path:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="</s>"))
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_the_child_finds_this_package_where_the_path_does_not_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An editable installation is found by a hook, which the child does not have."""
    elsewhere = [place for place in sys.path if not (Path(place) / "tide_mega").is_dir()]
    monkeypatch.setattr(sys, "path", elsewhere)
    assert load_tokenizer(tokenizer_file(tmp_path, {"</s>": 0, "a": 1}), "</s>").vocab_size == 2


@pytest.mark.parametrize(
    ("act", "limits", "why"),
    [
        ("os.abort()", {}, "ends the process that loads it (signal 6: nothing said)"),
        ("os._exit(7)", {}, "ends the process that loads it (status 7: nothing said)"),
        ("sys.exit('planted')", {}, "ends the process that loads it (status 1: planted)"),
        ("bytearray(2**31)", {"MOST_BYTES": 2**31}, "takes more than 2 GiB of memory to load"),
        ("while True: pass", {"MOST_SECONDS": 1}, "takes more than 1 s to load"),
    ],
)
def test_what_ends_a_process_is_refused_and_this_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str, limits: dict[str, int], why: str
) -> None:
    path = tokenizer_file(tmp_path, {"</s>": 0, "a": 1})
    monkeypatch.setattr(trial, "_PROGRAM", LOADER.format(act=act))
    for name, value in limits.items():
        monkeypatch.setattr(trial, name, value)
    with pytest.raises(ConfigError) as refusal:
        load_tokenizer(path)
    assert str(refusal.value) == (
        f"tokenizer={path} {why}: it is damaged, or made to do harm; take it from its source."
    )


def test_a_text_that_a_tokenizer_has_no_tokens_for_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"YQ== 0\nYg== 1\n")  # tiktoken panics at any other letter
    assert load_tokenizer(tmp_path).token_bytes(1) == b"b"


def test_too_little_memory_is_no_damage_that_this_process_looks_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    act = "raise ConfigError('not readable') from MemoryError()"
    monkeypatch.setattr(trial, "_PROGRAM", LOADER.format(act=act))
    with pytest.raises(ConfigError, match="takes more than 4 GiB of memory to load"):
        load_tokenizer(tokenizer_file(tmp_path, {"</s>": 0}))


def test_what_the_loader_refuses_is_refused_in_its_own_sentence(tmp_path: Path) -> None:
    path = tokenizer_file(tmp_path, {"no end": 0})
    with pytest.raises(ConfigError, match="name its end-of-document token with eos_token"):
        load_tokenizer(path)


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    started: list[list[str]] = []
    run: Callable[..., object] = subprocess.run

    def counted(words: list[str], **options: object) -> object:
        started.append(words)
        return run(words, **options)

    monkeypatch.setattr(trial.subprocess, "run", counted)
    return started


def test_the_same_content_is_tried_once(tmp_path: Path, children: list[list[str]]) -> None:
    path = tokenizer_file(tmp_path, {"</s>": 0, "a": 1})
    assert [load_tokenizer(where).eos_id for where in (path, path, tmp_path)] == [0, 0, 0]
    path.rename(tmp_path / "other.json")
    load_tokenizer(tmp_path / "other.json")
    assert len(children) == 1
    load_tokenizer(tokenizer_file(tmp_path, {"</s>": 0, "b": 1}))
    load_tokenizer(tmp_path / "other.json", "a")
    assert len(children) == 3
    load_tokenizer(tokenizer_file(tmp_path, {"</s>": 0, "c": 1}), is_tried=True)
    assert len(children) == 3


def test_absurd_ids_are_refused(tmp_path: Path) -> None:
    assert load_tokenizer(tokenizer_file(tmp_path, {"</s>": 0, "a": MOST_TYPES - 1})).vocab_size == MOST_TYPES
    with pytest.raises(ConfigError, match=r"has a token of id 16,777,216, and ids stay below 16,777,216"):
        load_tokenizer(tokenizer_file(tmp_path, {"</s>": 0, "a": MOST_TYPES}))


def test_a_dataset_has_the_tokenizer_of_its_tokens(tiny_data: Path, tmp_path: Path) -> None:
    assert dataset_tokenizer(tiny_data).fingerprint == DatasetIndex.load(tiny_data).tokenizer.fingerprint
    (tmp_path / "index.json").write_bytes((tiny_data / "index.json").read_bytes())
    content = json.loads((tiny_data / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, "version": "1.0"}, indent=1))
    with pytest.raises(
        DataError, match="is not the tokenizer that made the tokens beside it: put that one back"
    ):
        dataset_tokenizer(tmp_path)


def test_options_of_a_preparation_name_no_crashing_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tide_mega.data.prepare.pipeline import prepare

    (tmp_path / "a.txt").write_text("text")
    path = tokenizer_file(tmp_path, {"</s>": 0})
    monkeypatch.setattr(trial, "_PROGRAM", LOADER.format(act="os.abort()"))
    with pytest.raises(ConfigError, match="ends the process that loads it"):
        prepare(
            PrepareOptions(inputs=[str(tmp_path / "a.txt")], out=str(tmp_path / "out"), tokenizer=str(path))
        )
    assert not (tmp_path / "out").exists()
