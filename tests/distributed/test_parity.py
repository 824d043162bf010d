"""Every topology against the plain single-process reference, on the same weights and data."""

import pytest

from tests.support.slow import quick_and_slow
from tide_mega.lab.parity.case import Case
from tide_mega.lab.parity.check import BF16, FP32, over_ranks
from tide_mega.lab.parity.run import compare_gradients, compare_training, compare_updates

GRADIENT_CASES = [
    Case(tensor=tensor, sequence_parallel=sp, num_blocks=blocks, tie_embeddings=tied)
    for tensor, sp in ((1, False), (2, False), (2, True))
    for blocks in (0, 3, 8)
    for tied in (True, False)
]
GRADIENT_CASES += [
    Case(pipeline=2, tie_embeddings=True),
    Case(pipeline=2, virtual_pipeline=2, num_blocks=8, tie_embeddings=False, window=2, accumulation=4),
    Case(tensor=2, sequence_parallel=True, owners="tensor_data"),
]

TRAINING_CASES = [
    Case(num_blocks=0),
    Case(num_blocks=3),
    Case(num_blocks=3, zero_stage=2),
    Case(num_blocks=3, table_lr_multiplier=5.0),
    Case(data=2, num_blocks=0),
    Case(data=2, num_blocks=3),
    Case(data=2, num_blocks=3, zero_stage=2, accumulation=4),
    Case(data=2, num_blocks=3, accumulation=1, tie_embeddings=False),
    Case(tensor=2, num_blocks=0),
    Case(tensor=2, num_blocks=3),
    Case(tensor=2, sequence_parallel=True, num_blocks=3),
    Case(tensor=2, sequence_parallel=True, num_blocks=8, zero_stage=2, recompute="full"),
    Case(recompute="selective", num_blocks=3),
    Case(recompute="full", num_blocks=3),
    Case(tensor=2, data=2, num_blocks=3),
    Case(tensor=2, data=2, num_blocks=3, sequence_parallel=True, zero_stage=2),
]


def is_quick(case):
    """Whether every change trains it: two processes at most, one thing beside owners unlike the plain case."""
    plain = Case(precision=case.precision, accumulation=case.accumulation, tie_embeddings=case.tie_embeddings)
    changed = [key for key, value in vars(case).items() if value != getattr(plain, key)]
    return case.world <= 2 and len(changed) <= 1 + (case.owners == "tensor_data")


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)
def test_loss_and_all_gradients_equal_the_reference(pools, case, record_property):
    deviation = over_ranks(pools(case.world).run(compare_gradients, case))
    record_property("worst", deviation.worst())
    assert not deviation.excesses(FP32)


@pytest.mark.parametrize("case", quick_and_slow(filter(is_quick, TRAINING_CASES), TRAINING_CASES), ids=str)
def test_five_clipped_adamw_steps_equal_the_reference(pools, case, record_property):
    deviation = over_ranks(pools(case.world).run(compare_training, case))
    record_property("worst", deviation.worst())
    assert not deviation.excesses(FP32)


BF16_CASES = [
    Case(precision="bf16", num_blocks=blocks, zero_stage=stage, data=data, tensor=tensor, accumulation=4)
    for blocks, stage, data, tensor in ((0, 1, 1, 1), (3, 1, 1, 1), (3, 2, 2, 1), (3, 1, 1, 2))
]
BF16_CASES += [
    Case(precision="bf16", pipeline=2, accumulation=4),
    Case(precision="bf16", data=2, owners="tensor_data", accumulation=4),
]


@pytest.mark.parametrize("case", quick_and_slow(filter(is_quick, BF16_CASES), BF16_CASES), ids=str)
def test_bf16_with_fp32_master_weights_errs_as_the_reference_in_bf16_does(pools, case, record_property):
    deviation = over_ranks(pools(case.world).run(compare_updates, case))
    record_property("worst", deviation.worst())
    assert not deviation.excesses(BF16)


TOPOLOGY_CASES = [
    Case(pipeline=2, num_blocks=0),
    Case(pipeline=2, num_blocks=3, accumulation=4),
    Case(pipeline=2, num_blocks=3, tie_embeddings=False),
    Case(pipeline=2, virtual_pipeline=2, num_blocks=3, accumulation=4),
    Case(data=2, owners="tensor_data"),
    Case(data=2, owners="tensor_data", vocab_size=61),
    Case(data=2, owners="tensor_data", window=1, accumulation=4),
    Case(data=2, owners="tensor_data", exchange_ahead=True, table_lr_multiplier=3.0),
    Case(tensor=2, owners="tensor_data", sequence_parallel=True),
    Case(num_blocks=3, window=2, accumulation=4),
    Case(num_blocks=3, exchange_ahead=True),
    Case(data=2, zero_stage=3, num_blocks=0, tie_embeddings=False),
    Case(data=2, zero_stage=3, num_blocks=3),
    Case(pipeline=2, data=2, owners="tensor_data", zero_stage=2),
    Case(pipeline=2, data=2, num_blocks=8, recompute="full", accumulation=4),
    Case(tensor=2, pipeline=2, sequence_parallel=True, num_blocks=3),
    Case(tensor=2, data=2, owners="tensor_data", sequence_parallel=True, recompute="selective"),
    Case(pipeline=4, num_blocks=3, accumulation=4),
    Case(tensor=2, pipeline=2, data=2, sequence_parallel=True, owners="tensor_data", zero_stage=2),
]


@pytest.mark.parametrize("case", quick_and_slow(filter(is_quick, TOPOLOGY_CASES), TOPOLOGY_CASES), ids=str)
def test_other_topologies_train_as_the_reference(pools, case, record_property):
    deviation = over_ranks(pools(case.world).run(compare_training, case))
    record_property("worst", deviation.worst())
    assert not deviation.excesses(FP32)
