"""Rows dealt out in turn, to ranges and back."""

import pytest
import torch
import torch.distributed as dist

from tide_mega.memory.deal import Deal


def there_and_back(vocab_size, owners):
    """Return this process's range, and whether the way back gives what was dealt."""
    deal = Deal(dist.group.WORLD, owners, vocab_size)
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


@pytest.mark.slow
def test_three_owners_of_four_processes(pools):
    assert pools(4).run(there_and_back, 10, (0, 1, 3)) == [(0, 4), (4, 8), (0, 0), (8, 10)]
