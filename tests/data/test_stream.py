import json
import logging
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tide_mega
from tide_mega.config.schema import DataConfig
from tide_mega.data import stream as stream_module
from tide_mega.data.index import DatasetIndex
from tide_mega.data.prepare.options import PrepareOptions
from tide_mega.data.stream import TokenStream
from tide_mega.errors import ConfigError, DataError, UnreadableShardError


@pytest.fixture
def dataset(
    options: PrepareOptions, documents: list[str], run: Callable[[PrepareOptions], DatasetIndex]
) -> Path:
    run(replace(options, unit_bytes=2500))
    return Path(options.out)


@pytest.fixture
def train_tokens(dataset: Path, read_split: Callable) -> np.ndarray:
    return read_split(dataset, "train")[0]


@pytest.mark.parametrize("seq_length", [1, 7, 64, 200, 1000])
def test_windows_span_samples_and_shards(dataset: Path, train_tokens: np.ndarray, seq_length: int) -> None:
    stream = TokenStream.open(dataset, "train", seq_length)
    assert stream.num_tokens == len(train_tokens)
    assert len(stream) == (len(train_tokens) - 1) // seq_length
    for i in range(len(stream)):
        window = stream.window(i)
        assert window.dtype == np.int64
        assert window.tolist() == train_tokens[i * seq_length : (i + 1) * seq_length + 1].tolist()
    rest = train_tokens[len(stream) * seq_length :]
    if len(rest) > 1:
        assert stream.window(len(stream)).tolist() == rest.tolist()
    for outside in (-1, len(stream) + 1):
        with pytest.raises(IndexError):
            stream.window(outside)


def test_any_span_reads_right_with_few_shards_open(
    dataset: Path, train_tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "_OPEN_SHARDS", 2)
    stream = TokenStream.open(dataset, "train", 10)
    rng = np.random.default_rng(0)
    for _ in range(200):
        start, stop = sorted(rng.integers(0, len(train_tokens) + 1, 2).tolist())
        assert stream.tokens(start, stop).tolist() == train_tokens[start:stop].tolist()


def test_a_pickled_stream_carries_no_tokens_and_reads_the_same(dataset: Path) -> None:
    stream = TokenStream.open(dataset, "train", 16)
    before = pickle.dumps(stream)
    stream.window(0)
    assert pickle.dumps(stream) == before
    assert pickle.loads(before).window(3).tolist() == stream.window(3).tolist()


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[:-1000])
    elif how == "linked":
        path.symlink_to(path.rename(path.with_name("away")))
    elif how == "longer":
        path.write_bytes(content + b"x")
    else:
        path.write_bytes(content[:700] + bytes([content[700] ^ 1]) + content[701:])


DAMAGES = [
    ("missing", "size", "is missing"),
    ("truncated", "size", "is truncated: it has .* bytes, and the index says"),
    ("longer", "size", "is altered: it has"),
    ("linked", "size", "is a link, or no file"),
    ("truncated", "checksum", "is truncated"),
    ("flipped", "checksum", "is altered: its SHA-256"),
]


@pytest.mark.parametrize(("how", "verify", "message"), DAMAGES)
def test_a_bad_shard_is_named_with_what_to_do(dataset: Path, how: str, verify: str, message: str) -> None:
    victim = DatasetIndex.load(dataset).splits["train"].shards[2].file
    damage(dataset / victim, how)
    with pytest.raises(DataError, match=f"{victim} {message}.*on_bad_shard=skip"):
        TokenStream.open(dataset, "train", 16, verify=verify)


@pytest.mark.parametrize(("how", "verify", "message"), DAMAGES)
def test_a_bad_shard_is_skipped_with_a_warning_and_keeps_its_place(
    dataset: Path,
    train_tokens: np.ndarray,
    caplog: pytest.LogCaptureFixture,
    how: str,
    verify: str,
    message: str,
) -> None:
    whole = TokenStream.open(dataset, "train", 16, verify=verify)
    shards = DatasetIndex.load(dataset).splits["train"].shards
    damage(dataset / shards[2].file, how)
    with caplog.at_level(logging.WARNING):
        stream = TokenStream.open(dataset, "train", 16, verify=verify, on_bad_shard="skip")
    assert shards[2].file in caplog.text
    assert f"{shards[2].tokens} tokens left out" in caplog.text
    assert stream.fingerprint == whole.fingerprint
    assert (stream.num_tokens, stream.skipped_tokens) == (whole.num_tokens, shards[2].tokens)
    assert stream.bad_shards == [shards[2].file]
    start = sum(shard.tokens for shard in shards[:2])
    end = start + shards[2].tokens
    for i in range(len(stream)):
        if i * 16 < end and i * 16 + 17 > start:
            with pytest.raises(UnreadableShardError, match=shards[2].file) as info:
                stream.window(i)
            assert info.value.shard == shards[2].file
        else:
            assert stream.window(i).tolist() == train_tokens[i * 16 : i * 16 + 17].tolist()


def test_a_run_opens_its_data_by_its_own_rules_wherever_they_lie(dataset: Path, tmp_path: Path) -> None:
    victim = DatasetIndex.load(dataset).splits["train"].shards[2].file
    damage(dataset / victim, "flipped")
    moved = dataset.rename(tmp_path / "moved")
    of_run = DataConfig(path="gone", seq_length=16, verify="checksum", on_bad_shard="skip")
    stream = TokenStream.of_run(of_run, "train", folder=moved)
    assert stream.bad_shards == [victim] and stream.seq_length == 16
    with pytest.raises(DataError, match="SHA-256"):
        TokenStream.of_run(replace(of_run, on_bad_shard="fail"), "train", folder=moved)


def test_no_other_place_opens_the_data_of_a_run() -> None:
    package = Path(tide_mega.__file__).parent
    opening = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if "TokenStream.open(" in path.read_text(encoding="utf-8")
    }
    assert opening == {"memory/distinct.py"}  # a plan, of a dataset that no run may have seen yet


def test_fingerprint_tells_data_split_and_length_apart(dataset: Path) -> None:
    opened = [
        TokenStream.open(dataset, split, length).fingerprint
        for split, length in (("train", 16), ("train", 16), ("train", 17), ("validation", 16))
    ]
    assert opened[0] == opened[1]
    assert len(set(opened)) == 3


def test_a_split_without_tokens_is_refused(
    options: PrepareOptions, documents: list[str], run: Callable[[PrepareOptions], DatasetIndex]
) -> None:
    run(replace(options, validation_fraction=0.0))
    with pytest.raises(
        DataError, match=r"validation split of .* holds 0 readable tokens.*validation_fraction"
    ):
        TokenStream.open(options.out, "validation", 16)


def test_wrong_arguments_are_named(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.verify=hash is unknown; use size or checksum"):
        TokenStream.open(dataset, "train", 16, verify="hash")
    with pytest.raises(ConfigError, match=r"data.on_bad_shard=warn is unknown; use fail or skip"):
        TokenStream.open(dataset, "train", 16, on_bad_shard="warn")
    with pytest.raises(ConfigError, match=r"data.seq_length=0"):
        TokenStream.open(dataset, "train", 0)
    with pytest.raises(DataError, match="no split 'test'; it has train, validation"):
        TokenStream.open(dataset, "test", 16)
    with pytest.raises(DataError, match=r"has no index.json"):
        TokenStream.open(tmp_path, "train", 16)


def test_tokens_of_a_large_vocabulary_keep_their_32_bits(tmp_path: Path) -> None:
    from tide_mega.data.index import SplitRecord, TokenizerRecord, Totals
    from tide_mega.data.prepare.worker import SplitWriter

    writer = SplitWriter(
        tmp_path, "train", 0, vocab_size=128_256, eos_id=128_001, sample_tokens=5, shard_tokens=10
    )
    ids = np.random.default_rng(0).integers(65_536, 128_256, 33)
    writer.add(ids)
    shards = writer.close()
    DatasetIndex(
        TokenizerRecord("tokenizer.model", "", 128_256, 128_001),
        "uint32",
        {"train": SplitRecord(34, 1, shards)},
        Totals(1, 34, 0, 0, 0, 0, {}),
    ).save(tmp_path)
    assert json.loads((tmp_path / "index.json").read_text())["dtype"] == "uint32"
    stream = TokenStream.open(tmp_path, "train", 8, verify="checksum")
    assert stream.tokens(0, 34).tolist() == [*ids.tolist(), 128_001]
