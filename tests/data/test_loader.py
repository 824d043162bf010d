import itertools
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tide_mega.data.index import DatasetIndex, SplitRecord, TokenizerRecord, Totals
from tide_mega.data.loader import (
    IGNORE_LABEL,
    Permutation,
    TokenBatch,
    TrainBatches,
    train_batches,
    validation_batches,
)
from tide_mega.data.prepare.worker import SplitWriter
from tide_mega.data.stream import TokenStream
from tide_mega.errors import ConfigError, DataError

T = 8
EOS = 60_000


def make_stream(folder: Path, tokens: int) -> TokenStream:
    """A stream of the tokens 0, 1, 2, …, so that a window's first token is T times its number."""
    writer = SplitWriter(folder, "train", 0, vocab_size=60_001, eos_id=EOS, sample_tokens=29, shard_tokens=58)
    writer.add(np.arange(tokens - 1))
    shards = writer.close()
    index = DatasetIndex(
        TokenizerRecord("tokenizer.json", "", 60_001, EOS),
        "uint16",
        {"train": SplitRecord(tokens, 1, shards)},
        Totals(1, tokens, 0, 0, 0, 0, {}),
    )
    index.save(folder)
    return TokenStream.open(folder, "train", T)


@pytest.fixture
def stream(tmp_path: Path) -> TokenStream:
    return make_stream(tmp_path, 401)  # 50 windows


Open = Callable[..., TrainBatches]


@pytest.fixture
def open_batches(stream: TokenStream) -> Iterator[Open]:
    opened: list[TrainBatches] = []

    def open_(first_sample: int = 0, dp_rank: int = 0, dp_size: int = 1, **changes: int) -> TrainBatches:
        arguments = {"seed": 1, "global_batch_size": 12, "micro_batch_size": 3, "num_workers": 0, **changes}
        batches = train_batches(
            stream, first_sample=first_sample, dp_rank=dp_rank, dp_size=dp_size, **arguments
        )
        opened.append(batches)
        return batches

    yield open_
    for batches in opened:
        batches.close()


def windows(batch: TokenBatch) -> list[int]:
    """Window numbers of a batch of consecutive integers, after checking all its tokens and labels."""
    assert batch.tokens_BT.dtype == batch.labels_BT.dtype == torch.int64
    assert torch.equal(batch.tokens_BT - batch.tokens_BT[:, :1], torch.arange(T).expand_as(batch.tokens_BT))
    expected = batch.tokens_BT + 1
    expected[expected == 400] = EOS
    assert torch.equal(batch.labels_BT, expected)
    return [int(first) // T for first in batch.tokens_BT[:, 0]]


def take(batches: Iterator[TokenBatch], count: int) -> list[int]:
    return [i for batch in itertools.islice(batches, count) for i in windows(batch)]


def test_every_epoch_covers_each_window_once_in_a_new_order(open_batches: Open) -> None:
    order = take(open_batches(global_batch_size=10, micro_batch_size=5), 30)
    epochs = [order[start : start + 50] for start in (0, 50, 100)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != list(range(50))


def test_the_seed_decides_the_order(open_batches: Open) -> None:
    assert take(open_batches(), 8) == take(open_batches(), 8)
    assert take(open_batches(), 8) != take(open_batches(seed=2), 8)


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_ranks_take_contiguous_parts_of_each_step(open_batches: Open, dp_size: int) -> None:
    whole = take(open_batches(), 4 * 10)  # ten steps of 12
    ranks = [open_batches(dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
    for step in range(10):
        joined = [i for batches in ranks for i in take(batches, 4 // dp_size)]
        assert joined == whole[step * 12 : (step + 1) * 12]


def test_micro_batch_size_does_not_change_the_order(open_batches: Open) -> None:
    assert take(open_batches(micro_batch_size=1), 24) == take(open_batches(micro_batch_size=12), 2)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_goes_on_exactly_where_it_stopped_also_with_other_ranks(
    open_batches: Open, num_workers: int
) -> None:
    whole = take(open_batches(num_workers=num_workers), 4 * 9)
    for step in (1, 4, 5):  # 60 samples are more than an epoch of 50
        assert (
            take(open_batches(first_sample=12 * step, num_workers=num_workers), 4 * (9 - step))
            == whole[12 * step :]
        )
    halves = [take(open_batches(first_sample=36, dp_rank=rank, dp_size=2), 2) for rank in range(2)]
    assert halves[0] + halves[1] == whole[36:48]


def test_worker_processes_give_the_same_batches_and_leave_nothing_running(open_batches: Open) -> None:
    threads = set(threading.enumerate())
    processes = set(multiprocessing.active_children())
    batches = open_batches(num_workers=2)
    assert take(batches, 30) == take(open_batches(), 30)
    assert len(set(multiprocessing.active_children()) - processes) == 2
    batches.close()
    assert set(multiprocessing.active_children()) <= processes
    assert set(threading.enumerate()) <= threads
    with pytest.raises(StopIteration):
        next(batches)
    batches.close()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_leaves_the_global_random_state_alone(open_batches: Open, num_workers: int) -> None:
    before = torch.get_rng_state()
    take(open_batches(num_workers=num_workers), 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stream_shorter_than_a_sequence_is_refused(tmp_path: Path) -> None:
    short = make_stream(tmp_path, T)
    with pytest.raises(DataError, match=r"holds 8 tokens.*seq_length=8.*lower seq_length"):
        train_batches(
            short,
            seed=0,
            first_sample=0,
            global_batch_size=1,
            micro_batch_size=1,
            dp_rank=0,
            dp_size=1,
            num_workers=0,
        )


def test_one_window_is_enough(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, T + 1)
    batches = train_batches(
        stream,
        seed=0,
        first_sample=5,
        global_batch_size=4,
        micro_batch_size=2,
        dp_rank=0,
        dp_size=1,
        num_workers=0,
    )
    assert next(batches).tokens_BT.tolist() == [list(range(8))] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch_size": 10}, "global_batch_size=10 is no multiple of micro_batch_size 3 x 1"),
        ({"dp_size": 3}, "12 is no multiple of micro_batch_size 3 x 3"),
        ({"dp_rank": 1}, "rank 1 is not below"),
        ({"micro_batch_size": 0}, "micro_batch_size=0"),
        ({"first_sample": -1}, "first_sample=-1"),
    ],
)
def test_impossible_batches_are_refused(open_batches: Open, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_batches(**changes)


def validate(stream: TokenStream, sequences: int, micro: int, dp_size: int) -> list[list[TokenBatch]]:
    return [
        list(
            validation_batches(
                stream, seed=1, sequences=sequences, micro_batch_size=micro, dp_rank=rank, dp_size=dp_size
            )
        )
        for rank in range(dp_size)
    ]


@pytest.mark.parametrize("tokens", [2, 8, 9, 10, 100, 401, 404])
@pytest.mark.parametrize(("micro", "dp_size"), [(1, 1), (3, 1), (4, 2), (3, 4), (7, 3)])
def test_validation_predicts_every_token_but_the_first_once(
    tmp_path: Path, tokens: int, micro: int, dp_size: int
) -> None:
    ranks = validate(make_stream(tmp_path, tokens), 0, micro, dp_size)
    assert len({len(batches) for batches in ranks}) == 1
    labels: list[int] = []
    for batch in itertools.chain.from_iterable(ranks):
        assert batch.tokens_BT.shape == batch.labels_BT.shape == (micro, T)
        real = batch.labels_BT != IGNORE_LABEL
        labels += batch.labels_BT[real].tolist()
        following = torch.where(batch.labels_BT == EOS, batch.tokens_BT + 1, batch.labels_BT)
        assert torch.equal(following[real], batch.tokens_BT[real] + 1)
        assert (batch.tokens_BT[~real] == EOS).all()
    assert sorted(labels) == [*range(1, tokens - 1), EOS]


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_validation_takes_the_same_sequences_for_any_number_of_ranks(
    stream: TokenStream, dp_size: int
) -> None:
    def chosen(ranks: list[list[TokenBatch]]) -> set[int]:
        rows = [row for batches in ranks for batch in batches for row in batch.labels_BT.tolist()]
        return {row[0] for row in rows if row[0] != IGNORE_LABEL}

    assert chosen(validate(stream, 13, 3, dp_size)) == chosen(validate(stream, 13, 13, 1))
    assert len(chosen(validate(stream, 13, 3, dp_size))) == 13
    assert len(chosen(validate(stream, 999, 3, dp_size))) == 50


def test_validation_takes_the_sequences_of_the_permutations_first_epoch(stream: TokenStream) -> None:
    ((batch,),) = validate(stream, 13, 13, 1)
    windows = Permutation(50, 1, epoch=0)(np.arange(13))
    assert batch.tokens_BT[:, 0].tolist() == (T * windows).tolist()


def test_validation_refuses_wrong_numbers_at_once(stream: TokenStream) -> None:
    with pytest.raises(ConfigError, match="eval_sequences=-1"):
        validation_batches(stream, seed=1, sequences=-1, micro_batch_size=1, dp_rank=0, dp_size=1)
    with pytest.raises(ConfigError, match="rank 2 is not below"):
        validation_batches(stream, seed=1, sequences=1, micro_batch_size=1, dp_rank=2, dp_size=2)
