import math
import random
import statistics

import pytest

from tide_mega.training.faults.policy import SpikeWindow


def test_the_score_of_a_hand_made_window():
    # median 3, distances 2 1 0 1 7 -> their median 1
    window = SpikeWindow(5, [1.0, 2.0, 3.0, 4.0, 10.0])
    assert window.z_score(3 + 2 * 1.4826) == pytest.approx(2.0)
    assert window.z_score(3 - 1.4826) == pytest.approx(-1.0)


def test_nothing_is_judged_before_the_window_is_full():
    window = SpikeWindow(3, [2.0, 2.1])
    assert window.z_score(50.0) is None
    window.add(1.9)
    assert window.z_score(50.0) > 8


def test_a_window_keeps_the_last_losses_only():
    window = SpikeWindow(3, [9.0, 1.0, 2.0])
    window.add(3.0)
    assert window.losses == [1.0, 2.0, 3.0]


def test_a_constant_loss_has_a_scale_of_a_thousandth():
    window = SpikeWindow(4, [2.0] * 4)
    assert window.z_score(2.002) == pytest.approx(1.0)


def test_a_loss_that_is_not_finite_has_no_score():
    window = SpikeWindow(2, [1.0, 1.0])
    assert window.z_score(math.nan) is None
    assert window.z_score(math.inf) is None


def test_noise_stays_below_the_threshold_and_an_old_outlier_hides_no_new_one():
    draw = random.Random(7)
    losses = [2.5 + draw.gauss(0, 0.05) for _ in range(128)]
    losses[40] = 60.0
    window = SpikeWindow(128, losses)
    assert max(window.z_score(2.5 + draw.gauss(0, 0.05)) for _ in range(2000)) < 8
    assert window.z_score(3.2) > 8
    assert (3.2 - statistics.mean(losses)) / statistics.stdev(losses) < 1  # what a plain z-score would say
