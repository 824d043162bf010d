"""A shard that was sound at start and can no longer be read in the middle of a run."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tide_mega.data.loader import IGNORE_LABEL, train_batches, validation_batches
from tide_mega.data.stream import TokenStream
from tide_mega.errors import DataError


@pytest.fixture
def folder(tiny_data, tmp_path):
    return shutil.copytree(tiny_data, tmp_path / "data")


def shard_of(folder):
    return max(folder.glob("**/*train*.tar"), key=lambda path: path.stat().st_size)


def batches_of(folder, on_bad_shard, workers, check=None, *, seq_length=32):
    stream = TokenStream.open(folder, "train", seq_length, on_bad_shard=on_bad_shard)
    if check is not None:
        check(stream)
    return train_batches(
        stream,
        seed=1,
        first_sample=0,
        global_batch_size=4,
        micro_batch_size=4,
        dp_rank=0,
        dp_size=1,
        num_workers=workers,
    )


def cut_short(path):
    os.truncate(path, 1024)


def remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [cut_short, remove])
@pytest.mark.parametrize("workers", [0, 1])
def test_the_run_stops_with_one_sentence_that_names_the_shard(folder, damage, workers):
    shard = shard_of(folder)
    batches = batches_of(folder, "fail", workers, lambda _: damage(shard))
    with batches, pytest.raises(DataError) as info:
        for _ in range(200):
            next(batches)
    message = str(info.value)
    assert shard.name in message and "can no longer be read" in message
    assert "data.on_bad_shard=skip" in message
    assert "Traceback" not in message and "\n" not in message


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_cut_short_under_an_open_reader_is_no_bus_error(folder, workers):
    shard = shard_of(folder)

    def read_then_cut(stream):
        stream.window(0)
        cut_short(shard)

    with (
        batches_of(folder, "fail", workers, read_then_cut) as batches,
        pytest.raises(DataError, match="ends at byte"),
    ):
        for _ in range(200):
            next(batches)


@pytest.mark.parametrize("workers", [0, 1])
def test_other_windows_take_the_place_of_what_cannot_be_read(folder, workers, caplog):
    with batches_of(folder, "skip", workers) as sound:
        expected = [next(sound) for _ in range(40)]
        assert sound.take_left_out() == {}
    shard = shard_of(folder)
    half = shard.stat().st_size // 2
    with batches_of(folder, "skip", workers, lambda _: os.truncate(shard, half)) as damaged:
        found = [next(damaged) for _ in range(40)]
        left_out = damaged.take_left_out()
        assert damaged.take_left_out() == {}
    replaced = 0
    for batch, whole in zip(found, expected, strict=True):
        assert (batch.labels_BT != IGNORE_LABEL).all()
        assert torch.equal(batch.tokens_BT[:, 1:], batch.labels_BT[:, :-1])
        replaced += int((batch.tokens_BT != whole.tokens_BT).any(1).sum())
    assert left_out == {shard.name: replaced} and 0 < replaced < 160
    if workers == 0:
        assert sum(shard.name in record.message for record in caplog.records) >= 1


@pytest.fixture
def sharded(options, documents, run):
    """A dataset of several shards, with sequences of 16 tokens to be read."""
    run(replace(options, unit_bytes=2500))
    return Path(options.out)


def test_bad_from_the_start_and_bad_later_give_the_same_batches(sharded):
    shard = shard_of(sharded)
    with batches_of(sharded, "skip", 0, lambda _: remove(shard), seq_length=16) as during:
        expected = [next(during) for _ in range(20)]
    with batches_of(sharded, "skip", 0, seq_length=16) as before:
        for batch in expected:
            assert torch.equal(next(before).tokens_BT, batch.tokens_BT)
        assert before.take_left_out() == during.take_left_out() != {}


def test_data_of_which_nothing_can_be_read_ends_the_run(folder):
    with (
        batches_of(folder, "skip", 0, lambda _: remove(shard_of(folder))) as batches,
        pytest.raises(DataError, match="none can be read"),
    ):
        next(batches)


def held_out(folder):
    stream = TokenStream.open(folder, "validation", 16, on_bad_shard="skip")
    return list(validation_batches(stream, seed=1, sequences=0, micro_batch_size=4, dp_rank=0, dp_size=1))


def test_held_out_windows_that_cannot_be_read_are_left_out_and_the_others_stay(sharded):
    whole = held_out(sharded)
    max(sharded.glob("validation*.tar"), key=lambda path: path.stat().st_size).unlink()
    left_out = 0
    for batch, before in zip(held_out(sharded), whole, strict=True):
        for row in range(4):
            if torch.equal(batch.tokens_BT[row], before.tokens_BT[row]):
                assert torch.equal(batch.labels_BT[row], before.labels_BT[row])
            else:
                assert (batch.labels_BT[row] == IGNORE_LABEL).all()
                left_out += 1
    assert 0 < left_out < 4 * len(whole)


def test_a_shard_that_comes_back_is_read_again(folder):
    stream = TokenStream.open(folder, "train", 32)
    expected = stream.window(3)
    shard = shard_of(folder)
    content = shard.read_bytes()
    os.truncate(shard, 0)
    with pytest.raises(DataError):
        for i in range(len(stream)):
            stream.window(i)
    shard.write_bytes(content)
    assert np.array_equal(stream.window(3), expected)
