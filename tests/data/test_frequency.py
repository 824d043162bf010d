from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tide_mega.data.frequency import (
    BIN_GROUPS,
    DROPPED,
    NUM_BINS,
    UNSEEN,
    DecileTable,
    is_content,
    load_counts,
)
from tide_mega.errors import DataError


class HandMadeTokenizer:
    """Ids 0 … 26 with the spelling below; 0 is special."""

    pieces = (
        b"<|end|>",
        b" ",
        b"\n\n",
        b"...",
        b" (",
        *(bytes([c]) for c in range(ord("a"), ord("v"))),
        b"\xe2",
    )
    vocab_size = len(pieces)
    special_ids = frozenset({0})

    def token_bytes(self, token_id: int) -> bytes:
        return self.pieces[token_id]


def test_hand_made_vocabulary_has_the_known_bins() -> None:
    tokenizer = HandMadeTokenizer()
    counts = np.zeros(tokenizer.vocab_size, np.uint64)
    counts[[0, 1, 3]] = [1000, 500, 7]  # special, whitespace, punctuation
    letters = np.arange(5, 25)  # a … t, twenty types: two a bin
    counts[letters] = np.arange(20, 0, -1)  # a is the commonest
    table = DecileTable.from_counts(counts, tokenizer)
    assert table.bin_of_type[letters].tolist() == [9, 9, 8, 8, 7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0]
    assert table.bin_of_type[[0, 1, 3]].tolist() == [DROPPED] * 3
    assert table.bin_of_type[[2, 4, 25, 26]].tolist() == [UNSEEN] * 4
    assert table.count_ranges[0] == (1, 2)
    assert table.count_ranges[9] == (19, 20)
    assert table.types_per_bin == [2] * 10
    assert table.tokens_per_bin == [3, 7, 11, 15, 19, 23, 27, 31, 35, 39]
    assert (table.dropped_types, table.dropped_tokens, table.unseen_types) == (3, 1507, 4)


@given(counts=st.lists(st.integers(0, 50), max_size=300))
def test_bins_follow_the_formula_with_ties_broken_by_id(counts: list[int]) -> None:
    table = DecileTable.from_filter(np.array(counts, dtype=np.uint64), lambda v: v % 7 != 0)
    clean = sorted((count, v) for v, count in enumerate(counts) if count and v % 7)
    for rank, (_, v) in enumerate(clean):
        assert table.bin_of_type[v] == min(int(rank / len(clean) * 10 + 1e-9), 9)
    for v, count in enumerate(counts):
        if not count:
            assert table.bin_of_type[v] == UNSEEN
        elif v % 7 == 0:
            assert table.bin_of_type[v] == DROPPED


@given(kept=st.integers(0, 400), seed=st.integers(0, 1000))
def test_bins_hold_equally_many_types_and_rise_with_count(kept: int, seed: int) -> None:
    counts = np.random.default_rng(seed).integers(1, 10_000, kept)
    table = DecileTable.from_filter(counts, lambda v: True)
    assert sum(table.types_per_bin) == kept
    assert max(table.types_per_bin) - min(table.types_per_bin) <= 1
    ranges = [bounds for bounds in table.count_ranges if bounds is not None]
    assert all(low[1] <= high[0] for low, high in pairwise(ranges))
    assert sum(table.tokens_per_bin) + table.dropped_tokens == counts.sum()


def test_counts_beyond_32_bits_keep_their_order() -> None:
    counts = np.array([2**40, 2**33, 1, 2**33 + 1], dtype=np.uint64)
    table = DecileTable.from_filter(counts, lambda v: True)
    assert np.argsort(table.bin_of_type).tolist() == [2, 1, 3, 0]


def test_groups_partition_the_bins() -> None:
    assert [b for group in BIN_GROUPS.values() for b in group] == list(range(NUM_BINS))


@pytest.mark.parametrize(
    ("token", "content"),
    [
        (b"a", True), (b" the", True), (b"7", True), ("é".encode(), True), ("漢".encode(), True),
        (b"'s", True), (b"\xe6\xbc", True), (b" ", False), (b"\t\n", False), (b"", False), (b"?!", False),
        (b" ->", False), ("…".encode(), False),
    ],
)  # fmt: skip
def test_content_is_what_has_an_alphanumeric_character(token: bytes, content: bool) -> None:
    assert is_content(token) is content


def test_save_and_load_give_the_same_table(tmp_path: Path) -> None:
    counts = np.random.default_rng(3).integers(0, 9, 500)
    table = DecileTable.from_filter(counts, lambda v: v > 10)
    table.save(tmp_path)
    loaded = DecileTable.load(tmp_path)
    assert np.array_equal(loaded.bin_of_type, table.bin_of_type)
    assert loaded.bin_of_type.dtype == np.int8
    assert {**loaded.__dict__, "bin_of_type": 0} == {**table.__dict__, "bin_of_type": 0}


def test_few_types_leave_bins_empty(tmp_path: Path) -> None:
    table = DecileTable.from_filter(np.array([0, 5, 9]), lambda v: True)
    assert table.bin_of_type.tolist() == [UNSEEN, 0, 5]
    assert table.count_ranges[1] is None
    table.save(tmp_path)
    assert DecileTable.load(tmp_path).count_ranges == table.count_ranges


def test_counts_of_another_vocabulary_are_refused() -> None:
    with pytest.raises(DataError, match="another tokenizer"):
        DecileTable.from_counts(np.zeros(5, np.uint64), HandMadeTokenizer())


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=str(tmp_path)):
        DecileTable.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"PK\x03\x04", b"{}", None])
def test_damaged_deciles_and_counts_are_data_errors(tmp_path: Path, content: bytes | None) -> None:
    DecileTable.from_filter(np.arange(20), lambda v: True).save(tmp_path)
    for name in ("deciles.npy", "counts.npy"):
        (tmp_path / name).unlink(missing_ok=True)
        if content is not None:
            (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match="has no readable decile table"):
        DecileTable.load(tmp_path)
    with pytest.raises(DataError, match="has no readable counts"):
        load_counts(tmp_path)


@pytest.mark.parametrize(
    "values", [np.array([3, -8], np.int8), np.array([10]), np.array([0.5]), np.zeros((2, 2), int)]
)
def test_deciles_that_are_none_are_a_data_error(tmp_path: Path, values: np.ndarray) -> None:
    DecileTable.from_filter(np.arange(20), lambda v: True).save(tmp_path)
    np.save(tmp_path / "deciles.npy", values)
    with pytest.raises(DataError, match="has no readable decile table"):
        DecileTable.load(tmp_path)
