"""The gradient norm of each table, against the plain reference's gradients on the whole batch."""

import pytest
import torch

from tide_mega.lab.parity.case import Z_LOSS, Case, batches_of_rank, batches_of_step, configuration
from tide_mega.lab.parity.reference import canonical_gradients, reference_backward, reference_model
from tide_mega.lab.parity.run import build_engine, build_stage
from tide_mega.model.steps import compute_gradients
from tide_mega.training.live import table_square_norms

CASES = [
    Case(),
    Case(zero_stage=2, window=1),
    Case(data=2),
    Case(data=2, zero_stage=2, accumulation=4),
    Case(data=2, zero_stage=3),
    Case(zero_stage=3, num_blocks=8),
    Case(tensor=2),
    Case(tensor=2, zero_stage=3),
    Case(tensor=2, sequence_parallel=True, owners="tensor_data"),
    Case(data=2, owners="tensor_data"),
    Case(data=2, owners="tensor_data", vocab_size=61, zero_stage=2, num_blocks=1),
    Case(pipeline=2),
    Case(pipeline=2, owners="tensor_data"),
    pytest.param(Case(tensor=2, data=2, zero_stage=2), marks=pytest.mark.slow),
    pytest.param(Case(tensor=2, data=2, zero_stage=3), marks=pytest.mark.slow),
    pytest.param(Case(pipeline=2, data=2), marks=pytest.mark.slow),
]


def norms_here_and_in_the_reference(case):
    """Per-table norms after a step's backward pass, and the same after the update's clearing up and a second."""
    config = configuration(case)
    engine = build_engine(case, config, build_stage(case, config))
    try:
        data_rank = engine.module.groups.data_rank
        compute_gradients(engine, batches_of_rank(case, data_rank, 0), Z_LOSS, window=case.window)
        found = table_square_norms(engine, torch.device("cpu")).sqrt().tolist()
        engine.step(0.0)
        total = engine.grad_norm()
    finally:
        engine.close()
    reference = reference_model(config)
    reference_backward(reference, batches_of_step(case, 0))
    gradients = canonical_gradients(reference)
    expected = [float(gradients[f"memory.tables.{k}"].double().norm()) for k in range(case.num_blocks)]
    return found, expected, total


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_table_has_the_norm_of_the_reference(pools, case):
    results = pools(case.world).run(norms_here_and_in_the_reference, case)
    for found, expected, total in results:
        assert found == pytest.approx(expected, rel=1e-5)
        assert len(set(expected)) == case.num_blocks
        assert 0 < sum(norm**2 for norm in found) < total**2
    assert len({tuple(found) for found, *_ in results}) == 1, "ranks disagree"


def test_bf16_gradients_have_nearly_that_norm(pools):
    for owners in ("tensor", "tensor_data"):
        case = Case(data=2, precision="bf16", owners=owners)
        for found, expected, _ in pools(2).run(norms_here_and_in_the_reference, case):
            assert found == pytest.approx(expected, rel=0.03)


def test_without_memory_there_is_no_table(pools):
    ((found, expected, _),) = pools(1).run(norms_here_and_in_the_reference, Case(num_blocks=0))
    assert found == expected == []
