"""Microbatch sums in fp32, and gradients that tensor ranks hold in part."""

import torch
import torch.distributed as dist
from torch import nn

from tide_mega.config.schema import ParallelConfig
from tide_mega.parallel.accumulation import GradientAccumulator
from tide_mega.parallel.groups import make_groups


def widened_sum():
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    accumulator = GradientAccumulator([weight], make_groups(ParallelConfig(), 1), widen=True)
    # 256 + 1 is 256 in bf16: added one by one the small ones are lost, their fp32 sum is not.
    for value in [256.0, *[1.0] * 8]:
        (weight * value).sum().backward()
    assert weight.grad is None
    accumulator.finish()
    first = weight.grad.clone()
    weight.grad = None
    (weight * 3.0).sum().backward()
    accumulator.finish()
    second = weight.grad.clone()
    accumulator.close()
    weight.grad = None
    (weight * 5.0).sum().backward()
    return float(first), float(second), float(weight.grad)


def test_small_microbatches_are_not_lost_in_bf16(pools):
    assert pools(1).run(widened_sum) == [(264.0, 3.0, 5.0)]


def partial_sums(widen):
    replicated = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    sharded = nn.Parameter(torch.zeros(2))
    replicated.sequence_parallel = True
    groups = make_groups(ParallelConfig(tensor=2), 1)
    accumulator = GradientAccumulator([replicated, sharded], groups, widen=widen)
    rank = dist.get_rank()
    (replicated.sum() * (rank + 1) + sharded.sum() * (rank + 1)).backward()
    accumulator.finish()
    accumulator.close()
    return replicated.grad.tolist(), sharded.grad.tolist(), replicated.grad.dtype == torch.bfloat16


def test_parts_of_replicated_parameters_are_added_over_tensor_ranks(pools):
    for widen in (False, True):
        assert pools(2).run(partial_sums, widen) == [([3, 3], [1, 1], True), ([3, 3], [2, 2], True)]
