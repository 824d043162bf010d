"""Rows fetched from shards, and gradients returned to their owners, against the whole table."""

import pytest
import torch
import torch.distributed as dist

from tide_mega.memory.exchange import gather_rows
from tide_mega.memory.plan import plan_rows

CASES = {
    "ids at shard edges": [0, 3, 4, 7],
    "one id": [5],
    "only the first owner's": [0, 1, 2],
    "only the last owner's": [5, 6, 7],
    "all": list(range(8)),
    "none": [],
}


def exchange(ids):
    """Return (rows, whole-table rows, shard gradient, its part of the whole gradient)."""
    group = dist.group.WORLD
    whole = torch.randn(8, 2, 3, generator=torch.Generator().manual_seed(1))
    size = 8 // group.size()
    mine = slice(group.rank() * size, (group.rank() + 1) * size)
    shard = whole[mine].clone().requires_grad_()
    ids_U = torch.tensor(ids, dtype=torch.int64)
    rows = gather_rows(shard, ids_U, group)
    seed = torch.randn(len(ids), 2, 3, generator=torch.Generator().manual_seed(2))
    rows.backward(seed)
    expected = torch.zeros_like(whole)
    expected[ids_U] = seed
    return rows.detach(), whole[ids_U], shard.grad, expected[mine]


@pytest.mark.parametrize("name", CASES)
def test_rows_and_gradients_are_those_of_the_whole_table(pools, name):
    for rows, expected_rows, gradient, expected_gradient in pools(2).run(exchange, CASES[name]):
        assert torch.equal(rows, expected_rows)
        assert torch.equal(gradient, expected_gradient)


def ask_beyond():
    with pytest.raises(IndexError, match=r"span 2\.\.8.*8 rows.*model\.vocab_size"):
        plan_rows([torch.tensor([8, 2])], vocab_size=8)


def test_an_id_beyond_the_tables_is_named():
    ask_beyond()
