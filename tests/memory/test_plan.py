"""Plans: distinct ids and the way back to every token."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tide_mega.memory.plan import plan_rows


@given(st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=12), min_size=1, max_size=5))
def test_index_leads_every_token_back_to_its_id(microbatches):
    tokens = [torch.tensor([ids]) for ids in microbatches]
    plan = plan_rows(tokens)
    assert plan.ids_U.tolist() == sorted({i for ids in microbatches for i in ids})
    for index, original in zip(plan.index_MBT, tokens, strict=True):
        assert index.shape == original.shape
        assert torch.equal(plan.ids_U[index], original)
