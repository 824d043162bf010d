"""The input embedding in place of megatron-core's: same rows, and the whole gradient of a row used often.

Shapes: V vocabulary, W its entries on a rank, B sequences, T tokens, D width.
"""

import pytest
import torch
import torch.distributed as dist

from tide_mega.lab.parity.case import Case, configuration
from tide_mega.parallel.device import choose_device
from tide_mega.parallel.groups import make_groups
from tide_mega.training.setup import build_stage

USES = 3000
ONCE = 2**-8
"""What bf16 loses of a value that it rounds once."""
CASES = [
    Case(num_blocks=0, precision="bf16"),
    Case(num_blocks=0, precision="bf16", tie_embeddings=False),
    Case(num_blocks=0, precision="bf16", tensor=2),
    Case(num_blocks=0, precision="bf16", tensor=2, sequence_parallel=True),
    Case(num_blocks=0, precision="bf16", pipeline=2),
]


def look_up_and_back(case):
    """Whether rows are the weight's, and how far off its gradient is on this rank; None past the first stage."""
    config = configuration(case)
    groups = make_groups(config.parallel, 1)
    chunk = build_stage(config, groups, choose_device("cpu", 0)).transformers[0]
    if not chunk.pre_process:
        return None
    weight = chunk.embedding.word_embeddings.weight
    generator = torch.Generator().manual_seed(0)
    # Both halves of the vocabulary: a row used often, one used four times, and most of them not at all.
    ids = torch.tensor([1] * USES + [40] * USES + [2] * 4 + [63] * 4)
    ids_BT = ids[torch.randperm(len(ids), generator=generator)].view(2, -1)
    gradient_TBD = torch.rand(ids_BT.size(1), 2, weight.size(1), generator=generator).bfloat16()
    vocabulary = [torch.empty_like(weight) for _ in range(groups.tensor_size)]
    dist.all_gather(vocabulary, weight.detach(), group=groups.tensor)
    expected_TBD = torch.cat(vocabulary)[ids_BT].transpose(0, 1)

    rank, members = groups.tensor_rank, groups.tensor_size
    part = slice(None)
    if case.sequence_parallel:
        part = slice(rank * ids_BT.size(1) // members, (rank + 1) * ids_BT.size(1) // members)
    out = chunk.embedding(input_ids=ids_BT, position_ids=None)
    out.backward(gradient_TBD[part])
    exact_VD = torch.zeros(64, weight.size(1), dtype=torch.float64)
    exact_VD.index_add_(0, ids_BT.T.flatten(), gradient_TBD.flatten(0, 1).double())
    exact_WD = exact_VD.chunk(members)[rank]
    off = ((weight.grad - exact_WD).abs() / exact_WD).nan_to_num(0.0, posinf=torch.inf).max()
    return torch.equal(out, expected_TBD[part]), float(off)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_are_the_weights_and_one_used_3000_times_has_its_whole_gradient(pools, case):
    results = [result for result in pools(case.world).run(look_up_and_back, case) if result is not None]
    assert len(results) == case.tensor
    for same, off in results:
        assert same
        assert off < ONCE


def marks(case):
    """What DeepSpeed, the sharding and the tying read of the weight."""
    config = configuration(case)
    chunk = build_stage(config, make_groups(config.parallel, 1), choose_device("cpu", 0)).transformers[0]
    weight = chunk.shared_embedding_or_output_weight()
    return weight.tensor_model_parallel, getattr(weight, "shared_embedding", False)


def test_the_weight_keeps_megatrons_marks(pools):
    assert pools(2).run(marks, Case(num_blocks=0, tensor=2)) == [(True, False)] * 2
    assert pools(2).run(marks, Case(num_blocks=0, pipeline=2)) == [(True, True)] * 2
