"""Rows dealt out in turn, to ranges and back.

Shapes: V vocabulary, W rows of an owner, R rows of a range.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from tide_mega.memory import ownership as deal
from tide_mega.memory.ownership import OwnershipExchange


def there_and_back(vocab_size, owners, group=None):
    """Return this process's range, and whether the way back gives what was dealt."""
    deal = OwnershipExchange(group or dist.group.WORLD, owners, vocab_size)
    table_VKD = torch.arange(vocab_size * 6, dtype=torch.float32).view(vocab_size, 2, 3)
    dealt = None
    if deal.owner is not None:
        dealt = table_VKD[deal.owner :: len(owners)]
        padded = torch.cat([dealt, torch.full((1, 2, 3), torch.nan)])
    range_RKD = deal.to_range(None if dealt is None else padded, (2, 3))
    back = deal.from_range(range_RKD, (2, 3))
    first, last = (0, 0) if deal.owner is None else deal.range_of(deal.owner)
    assert torch.equal(range_RKD, table_VKD[first:last])
    assert torch.equal(back, table_VKD[:0] if dealt is None else dealt)
    return first, last


@dataclass
class Member:
    """A process of a group whose processes are threads: what `Deal` asks of a group, and its all-to-all."""

    place: int
    boxes: list
    everybody_is_here: threading.Barrier

    def rank(self):
        return self.place

    def size(self):
        return len(self.boxes)

    def exchange(self, received, sent, received_counts, sent_counts):
        assert (len(received), len(sent)) == (sum(received_counts), sum(sent_counts))
        self.boxes[self.place] = sent.split(sent_counts)
        self.everybody_is_here.wait(30)
        came = [box[self.place] for box in self.boxes]
        assert [len(part) for part in came] == received_counts
        torch.cat(came, out=received)
        self.everybody_is_here.wait(30)


@pytest.mark.parametrize(
    ("members", "vocab_size", "owners", "ranges"),
    [
        (3, 10, (0, 1, 2), [(0, 4), (4, 8), (8, 10)]),
        (4, 10, (0, 1, 3), [(0, 4), (4, 8), (0, 0), (8, 10)]),
        (4, 4, (1, 2, 3), [(0, 0), (0, 2), (2, 4), (4, 4)]),
        (5, 97, (0, 1, 2, 3, 4), [(0, 20), (20, 40), (40, 60), (60, 80), (80, 97)]),
    ],
)
def test_three_and_more_owners(monkeypatch, members, vocab_size, owners, ranges):
    def all_to_all(received, sent, received_counts, sent_counts, group):
        group.exchange(received, sent, received_counts, sent_counts)

    monkeypatch.setattr(deal.dist, "all_to_all_single", all_to_all)
    boxes, barrier = [()] * members, threading.Barrier(members)
    with ThreadPoolExecutor(members) as threads:
        groups = [Member(place, boxes, barrier) for place in range(members)]
        results = threads.map(lambda group: there_and_back(vocab_size, owners, group), groups)
        assert list(results) == ranges


@pytest.mark.parametrize(
    ("vocab_size", "owners", "ranges"),
    [
        (61, (0, 1), [(0, 31), (31, 61)]),
        (8, (0, 1), [(0, 4), (4, 8)]),
        (7, (1,), [(0, 0), (0, 7)]),
        (1, (0, 1), [(0, 1), (1, 1)]),
    ],
)
def test_ranges_are_contiguous_and_the_way_back_restores_the_deal(pools, vocab_size, owners, ranges):
    assert pools(2).run(there_and_back, vocab_size, owners) == ranges
