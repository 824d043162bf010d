import math

import pytest

from tide_mega.config.schema import OptimConfig
from tide_mega.training.schedule import learning_rate


def optim(**values: float | int | None) -> OptimConfig:
    return OptimConfig(**{"lr": 1.0, "init_lr": 0.2, "min_lr": 0.5, "warmup_steps": 4, **values})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 0.2),
        (1, 0.4),
        (3, 0.8),
        (4, 1.0),
        (6, 0.5 + 0.25 * (1 + math.sqrt(0.5))),
        (8, 0.75),
        (11, 0.5 + 0.25 * (1 + math.cos(math.pi * 7 / 8))),
        (12, 0.5),
        (100, 0.5),
    ],
)
def test_rates_at_the_borders(step: int, rate: float) -> None:
    assert learning_rate(step, optim(), total_steps=12) == pytest.approx(rate, rel=1e-15)
    assert learning_rate(step, optim(decay_steps=12), total_steps=50) == pytest.approx(rate, rel=1e-15)


def test_peak_and_minimum_are_met_exactly() -> None:
    config = OptimConfig()
    assert learning_rate(0, config, 100_000) == 1e-6
    assert learning_rate(5_000, config, 100_000) == pytest.approx((1e-6 + 1e-4) / 2, rel=1e-12)
    assert learning_rate(10_000, config, 100_000) == 1e-4
    assert learning_rate(55_000, config, 100_000) == pytest.approx((1e-4 + 1e-5) / 2, rel=1e-12)
    assert learning_rate(100_000, config, 100_000) == 1e-5


def test_without_warmup_the_first_update_has_the_peak() -> None:
    assert learning_rate(0, optim(warmup_steps=0), 10) == 1.0


def test_rises_then_falls() -> None:
    rates = [learning_rate(step, optim(), 40) for step in range(60)]
    assert rates[:5] == sorted(rates[:5])
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_all_warmup_ends_in_the_minimum() -> None:
    assert [learning_rate(step, optim(), 4) for step in (3, 4)] == [pytest.approx(0.8), 0.5]


def test_a_negative_step_is_refused() -> None:
    with pytest.raises(ValueError, match="step is -1"):
        learning_rate(-1, optim(), 10)
