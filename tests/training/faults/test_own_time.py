from tide_mega.parallel.device import choose_device
from tide_mega.training.faults.stragglers import OwnTime


def test_intervals_add_up_until_they_are_taken():
    times = iter([10.0, 12.0, 20.0, 20.5, 30.0, 31.0])
    own = OwnTime(choose_device("cpu", 0), clock=lambda: next(times))
    with own:
        pass
    with own:
        pass
    assert own.take() == 2.5
    with own:
        pass
    assert own.take() == 1.0
    assert own.take() == 0.0
