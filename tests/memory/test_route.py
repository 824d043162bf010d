"""Routes against the whole table: rows dealt to n owners in turn, owner = id mod n, its row = id div n.

Shapes: V vocabulary, U ids of one asker, W = ceil(V / n) rows of an owner, K blocks, D width.
"""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings

from tests.support.id_sets import exchanges
from tests.support.tables import planned_route
from tide_mega.memory.traffic import TrafficMeter

BLOCKS, WIDTH = 2, 3
ROW_BYTES, ID_BYTES = BLOCKS * WIDTH * 4, 8
QUICK = settings(max_examples=60, deadline=None)
HAND_MADE = {
    "nobody asks": (5, [[], []]),
    "one id everywhere": (6, [[3], [3]]),
    "all ids distinct": (8, [[0, 2, 5], [1, 3, 4, 6, 7]]),
    "everything": (7, [list(range(7)), list(range(7))]),
    "first and last of each shard": (7, [[0, 6], [1, 5]]),
    "only the other's": (8, [[1, 3, 5, 7], [0, 2, 4, 6]]),
    "one asks, the other does not": (8, [[], [0, 1, 2]]),
    "fewer rows than owners": (1, [[0], []]),
}


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole_table(vocabulary):
    return drawn(vocabulary, BLOCKS, WIDTH, seed=1)


def gradient_of(rank, ids):
    return drawn(len(ids), BLOCKS, WIDTH, seed=100 + rank)


def exchange(vocabulary, ids_by_rank):
    """What this rank received: its rows [U, K, D], the gradient of its shard [W, K, D], bytes by kind."""
    group, meter = dist.group.WORLD, TrafficMeter()
    rank, members = group.rank(), group.size()
    shard_WKD = torch.zeros(-(-vocabulary // members), BLOCKS, WIDTH)
    own = whole_table(vocabulary)[rank::members]
    shard_WKD[: len(own)] = own
    route = planned_route(torch.tensor(ids_by_rank[rank], dtype=torch.int64), group, meter)
    rows_UKD = route.fetch(shard_WKD[route.rows_Q], meter).wait()
    gradient_WKD = torch.zeros_like(shard_WKD)
    received_QKD = route.give_back(gradient_of(rank, ids_by_rank[rank]), meter)
    by = route.asked.by
    for rows_R, grad_RKD in zip(route.rows_Q.split(by), received_QKD.split(by), strict=True):
        gradient_WKD[rows_R] += grad_RKD
    return rows_UKD.numpy(), gradient_WKD.numpy(), meter.read()


def dense_gradient(vocabulary, ids_by_rank):
    """Sum over ranks in rank order, as dense embedding gradients would be."""
    whole = torch.zeros(vocabulary, BLOCKS, WIDTH)
    for rank, ids in enumerate(ids_by_rank):
        whole[ids] += gradient_of(rank, ids)
    return whole.numpy()


def expected_bytes(ids_by_rank, rank):
    """Bytes a rank moves, from the sets alone: what it asks of others, and what others ask of it."""
    members = len(ids_by_rank)
    asked = sum(i % members != rank for i in ids_by_rank[rank])
    served = sum(i % members == rank for other, ids in enumerate(ids_by_rank) if other != rank for i in ids)
    return {
        "ids": {"sent": asked * ID_BYTES, "received": served * ID_BYTES},
        "row gradients": {"sent": asked * ROW_BYTES, "received": served * ROW_BYTES},
        "rows": {"sent": served * ROW_BYTES, "received": asked * ROW_BYTES},
    }


def check(pool, vocabulary, ids_by_rank):
    members = len(ids_by_rank)
    table, gradient = whole_table(vocabulary).numpy(), dense_gradient(vocabulary, ids_by_rank)
    results = pool.run(exchange, vocabulary, ids_by_rank)
    for rank, (rows, shard_gradient, moved) in enumerate(results):
        np.testing.assert_array_equal(rows, table[ids_by_rank[rank]])
        own = gradient[rank::members]
        np.testing.assert_array_equal(shard_gradient[: len(own)], own)
        assert not shard_gradient[len(own) :].any(), "a row beyond the vocabulary has a gradient"
        assert moved == expected_bytes(ids_by_rank, rank)
    return results


@pytest.mark.parametrize("name", HAND_MADE)
def test_rows_gradients_and_bytes_are_those_of_the_sets(pools, name):
    check(pools(2), *HAND_MADE[name])


@QUICK
@given(case=exchanges(askers=2, members=2))
def test_two_owners_serve_any_sets(pools, case):
    check(pools(2), *case)


@pytest.mark.slow
@QUICK
@given(case=exchanges(askers=4, members=4))
@example(case=(6, [[0, 4], [], [5], [1, 2, 3]]))
def test_four_owners_serve_any_sets(pools, case):
    check(pools(4), *case)


@settings(max_examples=10, deadline=None)
@given(case=exchanges(askers=2, members=2))
def test_an_exchange_repeats_to_the_last_bit(pools, case):
    first, second = (pools(2).run(exchange, *case) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert one[0].tobytes() == other[0].tobytes()
        assert one[1].tobytes() == other[1].tobytes()
        assert one[2] == other[2]


def two_under_way():
    """Two fetches begun before either is waited for, and waited for in the other order."""
    group, meter = dist.group.WORLD, TrafficMeter()
    rank, table = group.rank(), whole_table(9)
    asked = [torch.tensor([0, 3, 8]), torch.tensor([1, 2, 3, 7][rank:])]
    pending = []
    for ids_U in asked:
        route = planned_route(ids_U, group, meter)
        pending.append(route.fetch(table[rank::2][route.rows_Q], meter))
    late = [fetched.wait() for fetched in reversed(pending)]
    return [torch.equal(rows, table[ids]) for rows, ids in zip(reversed(late), asked, strict=True)]


def test_fetches_under_way_together_do_not_mix(pools):
    assert pools(2).run(two_under_way) == [[True, True], [True, True]]
