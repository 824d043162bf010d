import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tide_mega.training.goodput import CATEGORIES, Ledger


class Clock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def nonzero(ledger: Ledger) -> dict[str, float]:
    return {name: seconds for name, seconds in ledger.seconds().items() if seconds}


def test_every_second_has_one_category():
    clock = Clock()
    ledger = Ledger(clock=clock, born=990.0)
    clock.now += 5
    with ledger.spend("resume"):
        clock.now += 3
    clock.now += 2
    ledger.enter("compute")
    clock.now += 70
    with ledger.spend("evaluation"):
        clock.now += 6
        with ledger.spend("data wait"):
            clock.now += 1
        clock.now += 3
    assert nonzero(ledger) == {
        "startup": 17.0,
        "resume": 3.0,
        "compute": 70.0,
        "evaluation": 9.0,
        "data wait": 1.0,
    }
    assert ledger.wall() == 100.0
    assert ledger.goodput() == 0.7


def test_an_unknown_category_is_refused():
    with pytest.raises(KeyError, match="'lunch' is no category"):
        Ledger(clock=Clock(), born=0.0).enter("lunch")


def test_the_step_that_was_not_applied_is_no_longer_productive():
    clock = Clock()
    ledger = Ledger(clock=clock, born=clock.now)
    ledger.enter("compute")
    clock.now += 10
    before = ledger.productive()
    clock.now += 4
    ledger.waste(before)
    assert nonzero(ledger) == {"compute": 10.0, "skipped": 4.0}


def test_restarts_count_the_time_between_and_the_work_done_again(tmp_path):
    path, clock = tmp_path / "goodput.json", Clock()
    first = Ledger(path, clock=clock, born=990.0)
    first.go_back(0)
    first.enter("compute")
    clock.now += 100
    first.mark_saved(50)
    clock.now += 30
    first.write()
    clock.now += 7  # killed: nobody knows what it did
    second = Ledger(path, clock=clock, born=1132.0)
    clock.now += 3
    with second.spend("resume"):
        clock.now += 2
    second.go_back(50)
    second.enter("compute")
    clock.now += 40
    assert nonzero(second) == {
        "startup": 10 + 8.0,
        "resume": 2.0,
        "compute": 140.0,
        "lost": 30.0,
        "down": 2.0,
    }
    assert second.starts == 2
    assert second.wall() == clock.now - 990.0
    # Without any checkpoint the third start loses all of it.
    second.write()
    third = Ledger(path, clock=clock, born=clock.now)
    third.go_back(0)
    assert (third.seconds()["compute"], third.seconds()["lost"]) == (0.0, 170.0)


def test_a_rollback_loses_what_came_after_the_checkpoint():
    clock = Clock()
    ledger = Ledger(clock=clock, born=clock.now)
    ledger.enter("compute")
    for step in (10, 20, 30):
        clock.now += 10
        ledger.mark_saved(step)
    ledger.go_back(20)
    assert nonzero(ledger) == {"compute": 20.0, "lost": 10.0}
    clock.now += 5
    ledger.go_back(20)
    assert nonzero(ledger) == {"compute": 20.0, "lost": 15.0}


def test_an_unknown_checkpoint_is_guessed_from_the_one_before_it():
    clock = Clock()
    ledger = Ledger(clock=clock, born=clock.now)
    ledger.enter("compute")
    clock.now += 10
    ledger.mark_saved(10)
    clock.now += 10
    ledger.go_back(15)
    assert nonzero(ledger) == {"compute": 10.0, "lost": 10.0}


def test_a_second_run_in_one_process_is_not_born_before_the_first_ended(tmp_path):
    path, clock = tmp_path / "goodput.json", Clock()
    first = Ledger(path, clock=clock, born=900.0)
    first.enter("compute")
    clock.now += 50
    first.write()
    clock.now += 5
    second = Ledger(path, clock=clock, born=900.0)
    assert nonzero(second) == {"startup": 105.0, "compute": 50.0}
    assert second.wall() == clock.now - 900.0


def test_a_clock_set_back_takes_nothing_away():
    clock = Clock()
    ledger = Ledger(clock=clock, born=clock.now)
    ledger.enter("compute")
    clock.now -= 500
    assert ledger.seconds()["compute"] == 0.0
    clock.now += 2
    assert ledger.seconds()["compute"] == 2.0


def test_the_training_clock_stands_still_outside_training_and_never_goes_back():
    clock = Clock()
    ledger = Ledger(clock=clock, born=clock.now)
    for category, passes in (("compute", 2), ("evaluation", 100), ("data wait", 3), ("checkpoint", 50)):
        ledger.enter(category)
        clock.now += passes
    assert ledger.training_seconds() == 5.0
    ledger.go_back(0)
    assert ledger.training_seconds() == 5.0


def test_phases_are_told_in_order():
    heard = []
    ledger = Ledger(clock=Clock(), born=0.0, on_phase=heard.append)
    with ledger.spend("resume"):
        ledger.enter("compute")
    assert heard == ["resume", "compute", "startup"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"starts": 3}'])
def test_a_damaged_ledger_begins_anew(tmp_path, content):
    path = tmp_path / "goodput.json"
    path.write_text(content)
    ledger = Ledger(path, clock=Clock(), born=999.0)
    assert (ledger.starts, ledger.wall()) == (1, 1.0)


def test_a_disk_that_refuses_is_logged_once(tmp_path, caplog):
    (tmp_path / "file").touch()
    ledger = Ledger(tmp_path / "file" / "goodput.json", clock=Clock(), born=0.0)
    with caplog.at_level(logging.WARNING):
        ledger.write()
        ledger.write()
    assert len(caplog.records) == 1


@given(
    st.lists(
        st.tuples(st.sampled_from(["enter", "save", "back", "waste", "restart"]), st.integers(0, 50)),
        max_size=30,
    )
)
def test_whatever_happens_the_categories_add_up_to_the_wall_time(tmp_path_factory, events):
    path, clock = tmp_path_factory.mktemp("ledger") / "goodput.json", Clock()
    ledger, step = Ledger(path, clock=clock, born=1000.0), 0
    for what, number in events:
        clock.now += number
        step += number
        if what == "enter":
            ledger.enter(CATEGORIES[number % len(CATEGORIES)])
        elif what == "save":
            ledger.mark_saved(step)
        elif what == "back":
            step = max(step - number, 0)
            ledger.go_back(step)
        elif what == "waste":
            before = ledger.productive()
            clock.now += 1
            ledger.waste(before)
        else:
            ledger.write()
            clock.now += 3
            ledger = Ledger(path, clock=clock, born=clock.now)
        assert ledger.wall() == pytest.approx(clock.now - 1000.0, abs=1e-6)
        assert all(seconds >= -1e-9 for seconds in ledger.seconds().values())
    ledger.write()
    assert json.loads(path.read_text())["starts"] == 1 + sum(what == "restart" for what, _ in events)
