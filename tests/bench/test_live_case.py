import pytest

from tide_mega.lab.bench.live_case import LOGGED, RECORDING, LiveCost, recording
from tide_mega.lab.bench.measure import Spread


def test_recording_is_what_gradients_of_logged_steps_take_longer():
    found = recording(logged=[5.0, 7.0, 6.0], others=[1.0, 2.0, 90.0])
    assert found == Spread(median=4.0, low=3.5, high=4.5)


def test_recording_that_noise_hides_costs_nothing():
    assert recording([1.0, 2.0, 4.0], [3.0]) == Spread(0.0, 0.0, 0.0)


def test_recording_counts_in_the_share_once_a_log_line():
    cost = LiveCost(Spread(2.0, 2.0, 2.0), {RECORDING: Spread(1.0, 1.0, 1.0)}, Spread(1.0, 1.0, 1.0))
    assert RECORDING in LOGGED
    assert cost.share(every=10, eval_every=1000) == pytest.approx(1.0 / 10 / 2.0)
