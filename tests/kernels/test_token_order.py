"""Sorting tokens by row."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tide_mega.kernels.token_order import TokenOrder


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 11), min_size=1, max_size=40))
def test_each_row_finds_its_tokens_in_their_order(rows):
    order = TokenOrder.sort(torch.tensor(rows), 12)
    for row in range(12):
        tokens = order.sorted_N[order.starts_U1[row] : order.starts_U1[row + 1]].tolist()
        assert tokens == [n for n, r in enumerate(rows) if r == row]


def test_packing_keeps_everything_and_the_key_names_the_packed_order():
    order = TokenOrder.sort(torch.tensor([3, 0, 3, 2]), 5)
    packed = order.pack()
    first, second = (TokenOrder.unpack(packed, 4) for _ in range(2))
    for name in ("index_N", "sorted_N", "starts_U1"):
        assert torch.equal(getattr(first, name), getattr(order, name))
        assert getattr(first, name).dtype == torch.int32
    assert (first.num_tokens, first.num_rows) == (4, 5)
    assert first.key == second.key != TokenOrder.unpack(order.pack(), 4).key
