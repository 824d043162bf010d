import random

import pytest

from tests.dashboard.samples import framed
from tide_mega.errors import DashboardError
from tide_mega.lab.dashboard.offline import BLOCK, CHUNK, HEADER, read_frames


def some_records(seed: int, sizes: list[int]) -> list[bytes]:
    chance = random.Random(seed)
    return [chance.randbytes(size) for size in sizes]


@pytest.mark.parametrize("seed", range(3))
def test_records_of_any_size_are_read_back(seed: int) -> None:
    chance = random.Random(seed)
    sizes = [chance.choice([0, 1, 100, 32_761, 32_762, 40_000, 120_000]) for _ in range(30)]
    records = some_records(seed, sizes)
    frames = read_frames(framed(records))
    assert frames.records == records
    assert frames.problems == [] and not frames.is_cut


@pytest.mark.parametrize("left", range(10))
def test_the_padding_at_the_end_of_a_block_is_passed_over(left: int) -> None:
    first = BLOCK - len(HEADER) - CHUNK.size - left
    records = some_records(1, [first, 50])
    assert read_frames(framed(records)).records == records


def test_every_prefix_gives_a_prefix_of_the_records() -> None:
    records = some_records(2, [3, 0, 40, 17])
    data = framed(records)
    for end in range(len(data) + 1):
        frames = read_frames(data[:end])
        assert frames.records == records[: len(frames.records)]
        # Only between two records does a cut go unnoticed.
        whole = framed(records[: len(frames.records)])
        assert frames.is_cut == (data[:end] != whole), end
        assert bool(frames.problems) == frames.is_cut
    assert len(frames.records) == 4


def test_a_large_file_cut_anywhere_gives_a_prefix() -> None:
    records = some_records(3, [10, 70_000, 5, 33_000, 33_000])
    data = framed(records)
    chance = random.Random(3)
    found = set()
    for end in [*(chance.randrange(len(data)) for _ in range(60)), BLOCK, 2 * BLOCK, len(data)]:
        frames = read_frames(data[:end])
        assert frames.records == records[: len(frames.records)]
        found.add(len(frames.records))
    assert {1, 5} <= found


def test_what_was_cut_is_said_in_bytes() -> None:
    data = framed([b"abc", b"defgh"])
    frames = read_frames(data[:-2])
    assert frames.records == [b"abc"]
    assert frames.problems == ["the file ends within a chunk: its last 10 bytes are no whole record"]


def test_a_wrong_crc_is_said_and_costs_its_block_alone() -> None:
    records = some_records(4, [100, 200, BLOCK, 300])
    data = bytearray(framed(records))
    data[7 + 107 + 50] ^= 1  # within the second record
    frames = read_frames(bytes(data))
    assert frames.records == [records[0], records[3]]
    assert len(frames.problems) == 1
    assert "CRC is wrong at byte 114" in frames.problems[0]
    assert not frames.is_cut


@pytest.mark.parametrize("seed", range(40))
def test_any_flipped_byte_is_noticed_and_what_is_read_is_whole(seed: int) -> None:
    chance = random.Random(seed)
    records = some_records(seed, [chance.randrange(1, 400) for _ in range(5)])
    data = bytearray(framed(records))
    data[chance.randrange(len(HEADER), len(data))] ^= 1 << chance.randrange(8)
    frames = read_frames(bytes(data))
    assert frames.problems
    assert frames.records == records[: len(frames.records)]


def test_zeros_that_a_lost_machine_left_are_said() -> None:
    frames = read_frames(framed([b"abc"]) + bytes(3 * BLOCK))
    assert frames.records == [b"abc"]
    assert frames.is_cut and "zeros" in frames.problems[0] and len(frames.problems) == 1


def test_another_kind_of_file_is_refused() -> None:
    with pytest.raises(DashboardError, match="another kind or version"):
        read_frames(b"step,loss\n1,2\n")
