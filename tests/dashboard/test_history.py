import math
from typing import Any

import numpy as np

from tide_mega.lab.dashboard.history import Row, RunHistory, standing


def train(step: int, tokens: int, loss: float = 1.0) -> Row:
    return {"step": step, "tokens": tokens, "train/loss": loss}


def held_out(step: int, tokens: int) -> Row:
    return {"step": step, "tokens": tokens, "eval/loss": 2.0}


def event(step: int, tokens: int) -> Row:
    return {"step": step, "tokens": tokens, "events/rollback": step}


def steps(rows: list[Row]) -> list[Any]:
    return [row["step"] for row in rows]


def test_rows_of_one_step_and_different_kinds_stay() -> None:
    rows = [train(10, 100), held_out(10, 100), train(20, 200), held_out(20, 200)]
    assert standing(rows) == (rows, 0)


def test_what_comes_after_a_resume_replaces_what_was_logged_before() -> None:
    before = [train(10, 100), held_out(10, 100), train(20, 200), train(30, 300)]
    after = [train(20, 200, 5.0), train(30, 300, 5.0)]
    kept, dropped = standing([*before, *after])
    assert kept == [*before[:2], *after]
    assert dropped == 2


def test_a_rollback_drops_the_steps_it_went_behind_and_keeps_events() -> None:
    skipped, rollback = event(15, 155), event(10, 250)
    rows = [train(10, 100), skipped, train(20, 200), rollback, train(20, 350)]
    kept, dropped = standing(rows)
    assert kept == [rows[0], skipped, rollback, rows[4]]
    assert dropped == 1


def test_events_after_the_checkpoint_of_a_resume_are_dropped() -> None:
    rows = [train(10, 100), event(15, 150), train(12, 120)]
    assert standing(rows) == ([rows[0], rows[2]], 1)


def test_an_event_that_comes_again_is_there_once() -> None:
    rows = [train(4, 40), event(5, 50), event(5, 50), train(10, 100)]
    assert standing(rows) == ([rows[0], rows[2], rows[3]], 1)


def test_what_the_abandoned_steps_alone_logged_goes_with_them() -> None:
    rows = [train(10, 100), train(20, 200), held_out(20, 200), train(30, 300)]
    again = [train(20, 200, 5.0), train(30, 300, 5.0)]
    assert standing([*rows, *again]) == ([rows[0], *again], 3)


def test_the_tail_alone_is_looked_at_and_still_every_later_step_is_found() -> None:
    logged = [train(step, 10 * step) for step in range(1, 200)]
    kept, dropped = standing([*logged, train(50, 500, 9.0), held_out(50, 500)])
    assert steps(kept) == [*range(1, 50), 50, 50]
    assert dropped == 150


def test_series_have_a_metrics_own_rows() -> None:
    run = RunHistory("a", "x", [train(10, 100, 4.0), held_out(10, 100), train(20, 200, math.nan)])
    series = run.series("train/loss")
    np.testing.assert_array_equal(series.step, [10, 20])
    np.testing.assert_array_equal(series.tokens, [100, 200])
    np.testing.assert_array_equal(series.value, [4.0, math.nan])
    assert run.names() == ["eval/loss", "train/loss"]
    assert len(run.series("absent").value) == 0
