import time

import pytest
import torch

from tide_mega.lab.bench import measure as timing
from tide_mega.lab.bench.measure import Spread, Stopwatch, measure_bandwidth, take_turns

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when told to."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(timing.time, "perf_counter", lambda: Clock.now)
    return Clock


def test_spread_by_hand():
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(median=3.0, low=2.0, high=4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_regions_of_one_name_add_up(clock):
    watch = Stopwatch(CPU)
    watch.start()
    for region, seconds in (("a", 1.0), ("b", 2.0), ("a", 4.0)):
        clock.now += seconds
        watch.mark(region)
    assert watch.read() == {"a": 5.0, "b": 2.0}
    watch.start()
    watch.mark("c")
    assert watch.read() == {"c": 0.0}


def test_actions_take_turns_after_the_warmup(clock):
    calls = []

    def action(name, seconds):
        def run(watch):
            calls.append(name)
            clock.now += seconds
            watch.mark("first")
            clock.now += 1.0
            watch.mark("second")

        return run

    found = take_turns({"x": action("x", 2.0), "y": action("y", 3.0)}, 3, CPU, warmup=1)
    assert calls == ["x", "y"] * 4
    assert found["x"] == {"first": [2.0] * 3, "second": [1.0] * 3, "total": [3.0] * 3}
    assert found["y"]["total"] == [4.0] * 3


def test_bandwidth_is_that_of_the_best_turn(monkeypatch):
    turns = {"copy": {"total": [2.0, 1.0]}, "triad": {"total": [3.0, 2.0]}}
    monkeypatch.setattr("tide_mega.lab.bench.measure.take_turns", lambda *_: turns)
    # 4,000 bytes are 1,000 values: a copy moves 8,000 bytes in a second, a triad 12,000 in two
    assert measure_bandwidth(CPU, size=4000) == 8000.0


def test_a_real_bandwidth_is_of_this_world():
    begin = time.perf_counter()
    assert 1e8 < measure_bandwidth(CPU, repeats=2, size=1 << 20) < 1e14
    assert time.perf_counter() - begin < 30
