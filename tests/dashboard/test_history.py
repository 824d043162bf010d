import math

import numpy as np

from tide_mega.lab.dashboard.history import Row, RunHistory


def train(step: int, tokens: int, loss: float = 1.0) -> Row:
    return {"step": step, "tokens": tokens, "train/loss": loss}


def held_out(step: int, tokens: int) -> Row:
    return {"step": step, "tokens": tokens, "eval/loss": 2.0}


def test_series_have_a_metrics_own_rows() -> None:
    run = RunHistory("a", "x", [train(10, 100, 4.0), held_out(10, 100), train(20, 200, math.nan)])
    series = run.series("train/loss")
    np.testing.assert_array_equal(series.step, [10, 20])
    np.testing.assert_array_equal(series.tokens, [100, 200])
    np.testing.assert_array_equal(series.value, [4.0, math.nan])
    assert run.names() == ["eval/loss", "train/loss"]
    assert len(run.series("absent").value) == 0
