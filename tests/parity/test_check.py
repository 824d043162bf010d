from tide_mega.lab.parity.case import Case
from tide_mega.lab.parity.check import Deviation, check_all
from tide_mega.lab.parity.pool import WorkerError


class FakePool:
    """Answers from a table, and writes down what was done to it."""

    def __init__(self, size, answers, journal):
        self.size, self.answers, self.journal = size, answers, journal

    def __enter__(self):
        self.journal.append(("open", self.size))
        return self

    def __exit__(self, *_):
        self.journal.append(("close", self.size))

    def start(self):
        pass

    def run(self, compare, case):
        assert compare is deviations_of
        self.journal.append(("run", case))
        answer = self.answers.get(case, [Deviation(0.0, 0.0, {"a": 0.0})] * self.size)
        if isinstance(answer, Exception):
            raise answer
        return answer


def deviations_of(case):
    raise AssertionError("only the workers call it")


def check(cases, answers):
    journal = []
    found = list(check_all(cases, deviations_of, lambda size: FakePool(size, answers, journal)))
    return found, journal


def test_one_pool_is_open_at_a_time_fewest_processes_first():
    four, one, two, also_one = Case(data=4), Case(), Case(tensor=2), Case(num_blocks=0)
    found, journal = check([four, one, two, also_one], {})
    assert [outcome.case for outcome in found] == [one, also_one, two, four]
    assert not any(outcome.failures for outcome in found)
    assert journal == [
        *[("open", 1), ("run", one), ("run", also_one), ("close", 1)],
        *[("open", 2), ("run", two), ("close", 2)],
        *[("open", 4), ("run", four), ("close", 4)],
    ]


def test_a_case_that_hangs_is_told_and_the_next_goes_on():
    hung, sound = Case(data=2), Case(tensor=2)
    found, _ = check([hung, sound], {hung: WorkerError("rank 0: no answer in 120 s")})
    assert found[0].deviation is None
    assert found[0].failures == ["rank 0: no answer in 120 s"]
    assert not found[1].failures


def test_the_worst_rank_decides_by_the_bounds_of_the_precision():
    low, exact = Case(data=2, precision="bf16"), Case(data=2)
    ranks = [Deviation(0.0, 0.0, {"a": 0.0}), Deviation(0.0, 0.0, {"a": 1.2})]
    found, _ = check([low, exact], {low: ranks, exact: ranks})
    assert found[0].failures == []
    assert found[1].failures == ["a 1.2e+00 > 1e-05"]
