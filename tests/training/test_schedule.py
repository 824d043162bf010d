"""The learning rate over a run: cosine, WSD, and where a branch warms up again."""

import math
from dataclasses import dataclass

import pytest

from tide_mega.config.schema import OptimConfig
from tide_mega.errors import ConfigError
from tide_mega.run.course import STEPS, TOKENS, Course
from tide_mega.training.optimizer import Schedule


@dataclass(frozen=True)
class At:
    step: int
    tokens: int = 0


def optim(**values: float | int | str | None) -> OptimConfig:
    return OptimConfig(**{"lr": 1.0, "init_lr": 0.2, "min_lr": 0.5, "warmup_steps": 4, **values})  # type: ignore[arg-type]


def steps(total: int) -> Course:
    return Course(STEPS, total, 8, 32)


def rate(step: int, config: OptimConfig, total: int) -> float:
    return Schedule.of(config, steps(total)).rate(At(step))


@pytest.mark.parametrize(
    ("step", "wanted"),
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
def test_rates_at_the_borders(step: int, wanted: float) -> None:
    assert rate(step, optim(), 12) == pytest.approx(wanted, rel=1e-15)
    assert rate(step, optim(decay_steps=12), 50) == pytest.approx(wanted, rel=1e-15)
    in_tokens = Schedule.of(optim(), Course(TOKENS, 12 * 256, 8, 32))
    assert in_tokens.rate(At(10**6, step * 256)) == rate(step, optim(), 12)


def test_peak_and_minimum_are_met_exactly() -> None:
    config = OptimConfig()
    assert rate(0, config, 100_000) == 1e-6
    assert rate(5_000, config, 100_000) == pytest.approx((1e-6 + 1e-4) / 2, rel=1e-12)
    assert rate(10_000, config, 100_000) == 1e-4
    assert rate(55_000, config, 100_000) == pytest.approx((1e-4 + 1e-5) / 2, rel=1e-12)
    assert rate(100_000, config, 100_000) == 1e-5


def test_without_warmup_the_first_update_has_the_peak() -> None:
    assert rate(0, optim(warmup_steps=0), 10) == 1.0


def test_rises_then_falls() -> None:
    rates = [rate(step, optim(), 40) for step in range(60)]
    assert rates[:5] == sorted(rates[:5])
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_wsd_stays_at_the_peak_and_falls_at_the_end_as_one_minus_a_root() -> None:
    config = optim(schedule="wsd", cooldown_steps=4)
    rates = [rate(step, config, 12) for step in range(14)]
    assert rates[:4] == [rate(step, optim(), 12) for step in range(4)]
    assert rates[4:9] == [1.0] * 5
    roots = [0.5 + 0.5 * (1 - math.sqrt(part)) for part in (0.25, 0.5, 0.75)]
    assert rates[9:12] == pytest.approx(roots, rel=1e-15)
    assert rates[12:] == [0.5, 0.5]


def test_wsd_without_a_cooldown_is_the_same_at_every_length() -> None:
    config = optim(schedule="wsd")
    assert Schedule.of(config, steps(12)) == Schedule.of(config, steps(500))
    assert [rate(step, config, 12) for step in (4, 12, 499)] == [1.0] * 3


@pytest.mark.parametrize("shape", ["cosine", "wsd"])
def test_a_branch_rises_from_its_parents_rate_and_begins_anew(shape: str) -> None:
    config = optim(schedule=shape, rewarmup_steps=2, cooldown_steps=0 if shape == "cosine" else 2)
    schedule = Schedule.rewarmed(config, steps(16), At(6), 0.6)
    rates = [schedule.rate(At(step)) for step in range(6, 17)]
    assert rates[:3] == pytest.approx([0.6, 0.8, 1.0], rel=1e-15)
    assert rates[-1] == 0.5
    assert rates[6] == pytest.approx(0.75 if shape == "cosine" else 1.0, rel=1e-15)  # halfway of 8 to 16


def test_in_tokens_the_warm_up_is_of_the_batch_that_the_schedule_was_made_with() -> None:
    schedule = Schedule.of(optim(), Course(TOKENS, 2560, 2, 32))
    assert (schedule.warmup, schedule.end) == (4 * 64, 2560)
    assert schedule.rate(At(0, 128)) == pytest.approx(0.6, rel=1e-15)


@pytest.mark.parametrize(
    ("values", "total", "sentence"),
    [
        ({}, 4, "optim.warmup_steps=4 is not below the run's 4 steps: use at most 3, or train longer."),
        (
            {"schedule": "wsd", "cooldown_steps": 9},
            12,
            "optim.cooldown_steps=9 does not fit between optim.warmup_steps=4 and the end, 12 steps on: "
            "use at most 8, or train longer.",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(values: dict[str, int | str], total: int, sentence: str) -> None:
    for course in (steps(total), Course(TOKENS, total * 256, 8, 32)):
        with pytest.raises(ConfigError) as refusal:
            Schedule.of(optim(**values), course)
        assert str(refusal.value) == sentence


def test_a_re_warm_up_longer_than_the_branch_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"optim.rewarmup_steps=6 is not below the branch's 6 steps: use at most 5"
    ):
        Schedule.rewarmed(optim(rewarmup_steps=6), steps(12), At(6), 0.5)


def test_it_is_read_as_it_was_kept() -> None:
    schedule = Schedule.of(optim(schedule="wsd", cooldown_steps=2), steps(12))
    assert Schedule.from_json(schedule.to_json()) == schedule


def test_a_negative_step_is_refused() -> None:
    with pytest.raises(ValueError, match="steps is -1"):
        rate(-1, optim(), 10)
