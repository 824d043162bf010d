"""A shard that was sound at start and can no longer be read in the middle of a run."""

import os
import shutil

import numpy as np
import pytest
import torch

from tide_mega.data.batch import IGNORE_LABEL
from tide_mega.data.errors import DataError
from tide_mega.data.loader import train_batches
from tide_mega.data.stream import TokenStream


@pytest.fixture
def folder(tiny_data, tmp_path):
    return shutil.copytree(tiny_data, tmp_path / "data")


def shard_of(folder):
    return max(folder.glob("**/*train*.tar"), key=lambda path: path.stat().st_size)


def batches_of(folder, on_bad_shard, workers, check=None):
    stream = TokenStream.open(folder, "train", 32, on_bad_shard=on_bad_shard)
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
def test_skipping_leaves_out_what_cannot_be_read_and_nothing_else(folder, workers, caplog):
    with batches_of(folder, "skip", workers) as sound:
        expected = [next(sound) for _ in range(40)]
    shard = shard_of(folder)
    half = shard.stat().st_size // 2
    with batches_of(folder, "skip", workers, lambda _: os.truncate(shard, half)) as damaged:
        found = [next(damaged) for _ in range(40)]
    left_out = 0
    for batch, whole in zip(found, expected, strict=True):
        for row in range(4):
            if torch.equal(batch.tokens_BT[row], whole.tokens_BT[row]):
                assert torch.equal(batch.labels_BT[row], whole.labels_BT[row])
            else:
                assert (batch.labels_BT[row] == IGNORE_LABEL).all()
                left_out += 1
    assert 0 < left_out < 160
    if workers == 0:
        assert sum(shard.name in record.message for record in caplog.records) >= 1


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
