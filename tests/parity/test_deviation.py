import math

import pytest

from tide_mega.lab.parity.case import Case
from tide_mega.lab.parity.check import BF16, FP32, Bounds, Deviation, bounds_of, largest, over_ranks

NAN = math.nan


def test_the_largest_is_found_and_nan_is_not_lost():
    assert largest([1.0, 3.0, 2.0]) == 3.0
    assert largest([]) == 0.0
    for values in ([NAN, 1.0], [1.0, NAN], [NAN]):
        assert largest(values) == math.inf


def test_ranks_join_to_the_worst_of_each_tensor():
    first = Deviation(1e-7, 2e-7, {"a": 1e-6, "memory.tables": 3e-6})
    second = Deviation(3e-7, 1e-7, {"a": 2e-6, "b": 1e-8})
    joined = over_ranks([first, second])
    assert joined == Deviation(3e-7, 2e-7, {"a": 2e-6, "memory.tables": 3e-6, "b": 1e-8})
    assert joined.worst() == 3e-6
    assert joined.worst_tensor() == ("memory.tables", 3e-6)
    assert joined.worst_parameter() == ("a", 2e-6)
    assert joined.tables() == 3e-6
    assert over_ranks([second]).tables() is None


def test_a_nan_on_one_rank_is_the_worst_of_all():
    joined = over_ranks(
        [Deviation(0.0, 0.0, {"a": NAN, "b": 1.0}), Deviation(NAN, 0.0, {"a": 0.0, "b": 1.0})]
    )
    assert joined.loss == joined.worst() == math.inf
    assert joined.worst_tensor() == ("a", math.inf)


@pytest.mark.parametrize(
    ("deviation", "named"),
    [
        (Deviation(1e-5, 1e-5, {"a": 1e-5}), []),
        (Deviation(1.1e-5, 0.0, {"a": 0.0}), ["loss 1.1e-05 > 1e-05"]),
        (Deviation(0.0, 0.5, {"a": 0.0}), ["norm 5.0e-01 > 1e-05"]),
        (Deviation(0.0, 0.0, {"a": 2e-5, "b": 0.0, "c": 1.0}), ["a 2.0e-05 > 1e-05", "c 1.0e+00 > 1e-05"]),
        (Deviation(NAN, math.inf, {"a": NAN}), ["loss nan > 1e-05", "norm inf > 1e-05", "a nan > 1e-05"]),
    ],
)
def test_what_is_over_its_bound_is_named(deviation, named):
    assert deviation.excesses(FP32) == named


def test_each_quantity_has_its_own_bound():
    assert Deviation(2.0, 3.0, {"a": 4.0}).excesses(Bounds(2.0, 3.0, 4.0)) == []
    assert Deviation(3.0, 2.0, {"a": 4.0}).excesses(Bounds(2.0, 3.0, 3.0)) == [
        "loss 3.0e+00 > 2",
        "a 4.0e+00 > 3",
    ]


def test_bounds_follow_the_precision():
    assert bounds_of(Case()) is FP32
    assert bounds_of(Case(precision="bf16")) is BF16
