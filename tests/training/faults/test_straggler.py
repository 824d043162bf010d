import pytest

from tide_mega.training.faults.stragglers import Stragglers

FOUR = [(0, "a"), (0, "a"), (1, "b"), (1, "c")]


def test_a_slow_rank_is_named_with_its_host():
    stragglers = Stragglers([(0, "a"), (1, "b"), (2, "c")], 1.5)
    for _ in range(4):
        stragglers.add([0.1, 0.25, 0.1])
    report = stragglers.report()
    assert report.slowest_ratio == pytest.approx(2.5)
    assert [str(slow) for slow in report.slow] == [
        "rank 1 on b computes 2.50 times as long as the median (0.25 s a step)"
    ]


def test_of_two_replicas_the_faster_is_the_measure_and_ranks_of_one_are_named_together():
    stragglers = Stragglers(FOUR, 1.5)
    stragglers.add([0.1, 0.1, 0.1, 0.2])
    report = stragglers.report()
    assert [(slow.ranks, slow.hosts) for slow in report.slow] == [([2, 3], ["b", "c"])]
    assert "ranks 2, 3 on b, c compute 2.00 times" in str(report.slow[0])


def test_below_the_ratio_none_is_named_but_the_ratio_is_told():
    stragglers = Stragglers(FOUR, 1.5)
    stragglers.add([0.1, 0.1, 0.1, 0.14])
    report = stragglers.report()
    assert report.slow == []
    assert report.slowest_ratio == pytest.approx(1.4)


def test_the_slowest_comes_first_and_a_report_begins_anew():
    stragglers = Stragglers([(n, f"h{n}") for n in range(5)], 1.5)
    stragglers.add([1, 2, 1, 3, 1])
    assert [slow.ranks for slow in stragglers.report().slow] == [[3], [1]]
    stragglers.add([1, 1, 1, 1, 1])
    assert stragglers.report().slow == []


def test_one_replica_and_no_measurement_say_nothing():
    alone = Stragglers(FOUR[:2], 1.5)
    alone.add([0.1, 0.9])
    assert alone.report().slowest_ratio is None
    assert Stragglers(FOUR, 1.5).report().slowest_ratio is None
