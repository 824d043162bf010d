"""That the comparison sees what it is there to see."""

import math

import pytest
import torch

from tide_mega.lab.parity.case import Case, configuration
from tide_mega.lab.parity.reference import canonical_parameters, reference_model
from tide_mega.lab.parity.run import build_stage, compare_training, expected_values, local_weights, relative


def test_relative_is_the_largest_difference_over_the_largest_magnitude():
    assert relative(torch.tensor([1.0, -4.0]), torch.tensor([1.5, -4.0])) == pytest.approx(0.5 / 4)
    assert relative(torch.zeros(2), torch.zeros(2)) == 0
    assert relative(torch.tensor([math.nan, 1.0]), torch.ones(2)) == math.inf
    assert relative(torch.ones(2), torch.tensor([math.nan, 1.0])) == math.inf
    with pytest.raises(ValueError, match=r"shapes differ: \(2,\) here, \(3,\) in the reference"):
        relative(torch.ones(2), torch.ones(3))


def scaled_row_gradient(case, factor):
    from tide_mega.memory.owned import OwnedTables

    whole = OwnedTables.add_gradient
    OwnedTables.add_gradient = lambda self, fetch, grad_UKD: whole(self, fetch, grad_UKD * factor)
    try:
        return compare_training(case)
    finally:
        OwnedTables.add_gradient = whole


def test_a_row_gradient_a_thousandth_too_large_is_seen(pools):
    (deviation,) = pools(1).run(scaled_row_gradient, Case(owners="tensor_data"), 1.001)
    assert deviation.norm > 1e-5


def test_a_row_gradient_a_hundredth_too_large_is_seen_in_the_tables(pools):
    # AdamW divides by the gradient's size: of a scale little is left in the weights.
    (deviation,) = pools(1).run(scaled_row_gradient, Case(owners="tensor_data"), 1.01)
    assert deviation.worst_tensor()[0] == "memory.tables"
    assert deviation.tables() > 1e-5


def add_one_without_reference():
    config = configuration(Case())
    stage = build_stage(Case(), config)
    canonical = canonical_parameters(reference_model(config))
    assert expected_values(stage, config, canonical).keys() == local_weights(stage).keys()
    stage.chunks[0].decoder.layers[2].extra = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(RuntimeError, match=r"nothing to compare layers\.2\.extra with"):
        expected_values(stage, config, canonical)


def test_a_weight_that_the_reference_does_not_have_is_refused(pools):
    pools(1).run(add_one_without_reference)
