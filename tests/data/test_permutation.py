import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tide_mega.data.loader import Permutation


@given(n=st.integers(1, 5000), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
def test_is_a_bijection(n: int, seed: int, epoch: int) -> None:
    values = Permutation(n, seed, epoch)(np.arange(n))
    assert np.array_equal(np.sort(values), np.arange(n))


@given(n=st.integers(1, 2**60), data=st.data())
def test_stays_in_range_and_keeps_points_apart_when_n_is_huge(n: int, data: st.DataObject) -> None:
    points = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20, unique=True))
    values = Permutation(n, 1, 0)(np.array(points))
    assert ((values >= 0) & (values < n)).all()
    assert len(set(values.tolist())) == len(points)


def test_one_point_at_a_time_equals_all_at_once() -> None:
    permutation = Permutation(1000, 7, 3)
    assert [permutation(np.array([i])).item() for i in range(1000)] == permutation(np.arange(1000)).tolist()


def test_seed_and_epoch_each_change_the_order() -> None:
    orders = {
        tuple(Permutation(100, seed, epoch)(np.arange(100)).tolist())
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25


@pytest.mark.parametrize("n", [2048, 4096])
def test_looks_random(n: int) -> None:
    values = Permutation(n, 5, 0)(np.arange(n)).astype(float)
    assert abs(np.corrcoef(np.arange(n), values)[0, 1]) < 0.06
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.06
    first = [Permutation(10, 0, epoch)(np.arange(1)).item() for epoch in range(2000)]
    assert (np.abs(np.bincount(first, minlength=10) - 200) < 70).all()


def test_the_order_is_the_same_in_every_version() -> None:
    assert Permutation(10, 1234, 0)(np.arange(10)).tolist() == [7, 8, 9, 1, 5, 2, 3, 4, 6, 0]
    assert Permutation(16, 1234, 0)(np.arange(16)).tolist() == [
        7,
        14,
        15,
        10,
        5,
        2,
        3,
        11,
        6,
        13,
        1,
        4,
        8,
        0,
        12,
        9,
    ]
    # 19 has an odd number of bits: the halves take one more.
    odd = [11, 14, 9, 6, 17, 4, 3, 16, 0, 2, 8, 5, 10, 15, 19, 1, 18, 12, 7, 13]
    assert Permutation(20, 1234, 0)(np.arange(20)).tolist() == odd


@pytest.mark.parametrize("n", [0, -1, 2**60 + 1])
def test_refuses_sizes_out_of_range(n: int) -> None:
    with pytest.raises(ValueError, match="within 1 to"):
        Permutation(n, 0, 0)
