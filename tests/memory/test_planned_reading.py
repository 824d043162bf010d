"""Tokens to rows and gradients home, by plan and exchange, against a dense embedding of the whole table.

Shapes: V vocabulary, U distinct ids of a replica, K blocks, D width, N tokens of a microbatch.
"""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.tables import BLOCKS, WIDTH, drawn, owned_tables, whole_rows
from tide_mega.memory.exchange import gather_rows
from tide_mega.memory.plan import plan_rows

QUICK = settings(max_examples=25, deadline=None)


def read_tokens(vocabulary, tokens_by_replica, tensor, dtype):
    """Plan and read a replica's microbatches [N]; return each token's rows and the owners' gradient."""
    tables = owned_tables(vocabulary, tensor, dtype)
    replica = tables.groups.data_rank
    microbatches = [torch.tensor([tokens], dtype=torch.int64) for tokens in tokens_by_replica[replica]]
    plan = plan_rows(microbatches, vocabulary, tables.owners)
    fetch = tables.fetch(plan)
    leaf_UKD = tables.rows_of(fetch).requires_grad_()
    read = []
    for number, index_BT in enumerate(plan.index_MBT):
        rows_NKD = leaf_UKD[index_BT.flatten()]
        read.append(rows_NKD.detach().float().numpy())
        (rows_NKD * drawn(*rows_NKD.shape, seed=10 * replica + number).to(dtype)).sum().backward()
    tables.add_gradient(fetch, leaf_UKD.grad)
    return read, tables.gradient_WKD.numpy(), tables.meter.read()


@pytest.mark.parametrize(("tensor", "data"), [(1, 2), (2, 1)])
@QUICK
@given(draw=st.data())
def test_planned_tokens_read_and_train_as_a_dense_embedding(pools, tensor, data, draw):
    vocabulary = draw.draw(st.integers(1, 21))
    microbatch = st.lists(st.integers(0, vocabulary - 1), min_size=1, max_size=12)
    replica = st.lists(microbatch, min_size=1, max_size=3)
    tokens = draw.draw(st.lists(replica, min_size=data, max_size=data))
    table = drawn(vocabulary, BLOCKS, WIDTH, seed=1).requires_grad_()
    expected = []
    for number, microbatches in enumerate(tokens):
        looked_up = [F.embedding(torch.tensor(ids), table.flatten(1)) for ids in microbatches]
        expected.append([rows.view(-1, BLOCKS, WIDTH) for rows in looked_up])
        for i, rows in enumerate(expected[-1]):
            ((rows * drawn(*rows.shape, seed=10 * number + i)).sum() / data).backward()
    results = pools(tensor * data).run(read_tokens, vocabulary, tokens, tensor, torch.float32)
    for rank, (read, _, _) in enumerate(results):
        for rows, wanted in zip(read, expected[rank // tensor], strict=True):
            np.testing.assert_array_equal(rows, wanted.detach().numpy())
    gradient = whole_rows([gradient for _, gradient, _ in results], vocabulary)
    np.testing.assert_allclose(gradient, table.grad.numpy(), rtol=1e-5, atol=1e-6)


def test_bf16_rows_are_the_rounded_master_and_their_gradients_add_up_in_fp32(pools):
    tokens = [[[0, 1, 2, 2]], [[2, 6]]]
    results = pools(2).run(read_tokens, 7, tokens, 1, torch.bfloat16)
    table = drawn(7, BLOCKS, WIDTH, seed=1).bfloat16()
    np.testing.assert_array_equal(results[0][0][0], table[[0, 1, 2, 2]].float().numpy())
    gradient = whole_rows([gradient for _, gradient, _ in results], 7)
    seeds = [drawn(4, BLOCKS, WIDTH, seed=0).bfloat16(), drawn(2, BLOCKS, WIDTH, seed=10).bfloat16()]
    expected = torch.zeros(7, BLOCKS, WIDTH)
    expected[[0, 1]] = seeds[0][:2].float() / 2
    expected[2] = (seeds[0][2] + seeds[0][3]).float() / 2 + seeds[1][0].float() / 2
    expected[6] = seeds[1][1].float() / 2
    np.testing.assert_array_equal(gradient, expected.numpy())
    # Rank 0 asks for 1 of the other's ids, the other for 2 and 6 of its: 6 elements of 2 bytes each.
    assert results[0][2] == {
        "ids": {"sent": 8, "received": 16},
        "row gradients": {"sent": 12, "received": 24},
        "rows": {"sent": 24, "received": 12},
    }


def test_tensor_ranks_ask_for_halves_and_gather_them(pools):
    results = pools(2).run(read_tokens, 8, [[[1, 2, 5, 6, 7]]], 2, torch.float32)
    # Rank 0 asks for 1, 2, 5 (1 and 5 elsewhere), rank 1 for 6, 7 (6 elsewhere); gathering moves 3 rows.
    assert [moved for _, _, moved in results] == [
        {
            "ids": {"sent": 16, "received": 8},
            "row gradients": {"sent": 48, "received": 24},
            "rows": {"sent": 24 + 72, "received": 48 + 72},
        },
        {
            "ids": {"sent": 8, "received": 16},
            "row gradients": {"sent": 24, "received": 48},
            "rows": {"sent": 48 + 72, "received": 24 + 72},
        },
    ]


def read_shards(vocabulary, microbatches):
    """As `read_tokens` of one replica, from tables in contiguous shards over the whole world."""
    group = dist.group.WORLD
    each = vocabulary // group.size()
    shard_WKD = drawn(vocabulary, BLOCKS, WIDTH, seed=1)[group.rank() * each :][:each].requires_grad_()
    plan = plan_rows([torch.tensor([tokens]) for tokens in microbatches])
    rows_UKD = gather_rows(shard_WKD, plan.ids_U, group)
    leaf_UKD = rows_UKD.detach().requires_grad_()
    read = []
    for number, index_BT in enumerate(plan.index_MBT):
        rows_NKD = leaf_UKD[index_BT.flatten()]
        read.append(rows_NKD.detach().numpy())
        (rows_NKD * drawn(*rows_NKD.shape, seed=number)).sum().backward()
    rows_UKD.backward(leaf_UKD.grad)
    return read, shard_WKD.grad.numpy()


@pytest.mark.parametrize("members", [2, 4])
@QUICK
@given(draw=st.data())
def test_planned_tokens_read_and_train_shards_as_a_dense_embedding(pools, members, draw):
    vocabulary = members * draw.draw(st.integers(1, 6))
    microbatch = st.lists(st.integers(0, vocabulary - 1), min_size=1, max_size=12)
    tokens = draw.draw(st.lists(microbatch, min_size=1, max_size=4))
    table = drawn(vocabulary, BLOCKS, WIDTH, seed=1).requires_grad_()
    expected = [F.embedding(torch.tensor(ids), table.flatten(1)).view(-1, BLOCKS, WIDTH) for ids in tokens]
    for i, rows in enumerate(expected):
        (rows * drawn(*rows.shape, seed=i)).sum().backward()
    results = pools(members).run(read_shards, vocabulary, tokens)
    for read, _ in results:
        for rows, wanted in zip(read, expected, strict=True):
            np.testing.assert_array_equal(rows, wanted.detach().numpy())
    gradient = np.concatenate([gradient for _, gradient in results])
    np.testing.assert_allclose(gradient, table.grad.numpy(), rtol=1e-5, atol=1e-6)
