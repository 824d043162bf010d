import json
from pathlib import Path

import pytest

from tide_mega.data.index import DatasetIndex, ShardRecord, SplitRecord, TokenizerRecord, Totals
from tide_mega.errors import DataError

INDEX = DatasetIndex(
    tokenizer=TokenizerRecord("tokenizer.json", "f" * 64, 512, 0),
    dtype="uint16",
    splits={"train": SplitRecord(9, 2, [ShardRecord("a.tar", 2048, "0" * 64, 9, 2, [(640, 5), (1920, 4)])])},
    totals=Totals(2, 9, 1, 0, 1, 0, {".py": 3}),
    bad=[{"source": "x", "reason": "is bad"}],
    empty_files=["é"],
    options={"seed": 1},
)


def test_save_and_load_give_the_same_index(tmp_path: Path) -> None:
    INDEX.save(tmp_path)
    assert DatasetIndex.load(tmp_path) == INDEX


def test_a_folder_without_an_index_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no index.json; run tools/prepare_data.py"):
        DatasetIndex.load(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"format": "tide_mega.tokens", "version": 1}'])
def test_a_damaged_index_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(DataError, match=r"index.json is damaged"):
        DatasetIndex.load(tmp_path)


def test_another_version_is_refused(tmp_path: Path) -> None:
    INDEX.save(tmp_path)
    path = tmp_path / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    with pytest.raises(DataError, match="version 99, but this version reads"):
        DatasetIndex.load(tmp_path)


@pytest.mark.parametrize("name", ["../a.tar", "/a.tar", "", ".", "..", "b/a.tar", "a\0.tar", 7, None])
@pytest.mark.parametrize("place", ["shard", "tokenizer"])
def test_an_index_that_names_what_lies_elsewhere_is_refused(tmp_path: Path, place: str, name: object) -> None:
    INDEX.save(tmp_path)
    path = tmp_path / "index.json"
    content = json.loads(path.read_text())
    there = content["tokenizer"] if place == "tokenizer" else content["splits"]["train"]["shards"][0]
    there["file"] = name
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"index.json is damaged \(.* is not the plain name of a file\)"):
        DatasetIndex.load(tmp_path)


def test_a_tokenizer_that_is_a_link_is_refused(tmp_path: Path) -> None:
    INDEX.save(tmp_path)
    (tmp_path / "tokenizer.json").symlink_to(tmp_path / "index.json")
    with pytest.raises(DataError, match=r"tokenizer.json is a link"):
        DatasetIndex.load(tmp_path)
