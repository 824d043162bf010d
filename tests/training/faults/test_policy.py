import json
import math

import pytest

from tide_mega.config.schema import FaultConfig
from tide_mega.training.faults.policy import Action, DivergedError, FaultPolicy, Vote


def vote(loss=2.0, loss_ok=True, gradient_ok=True):
    return Vote(is_loss_finite=loss_ok, is_gradient_finite=gradient_ok, loss=loss, seconds_by_rank=[0.1])


def policy(on_spike="log", **values):
    return FaultPolicy(FaultConfig(on_spike=on_spike, **{"spike_window": 8, **values}))


def go(policy, vote, step=1, can_roll_back=True):
    verdict = policy.judge(vote, can_roll_back=can_roll_back)
    policy.count(verdict)
    policy.stop_if_hopeless(step, verdict)
    return verdict


def settled(on_spike="log", **values):
    one = policy(on_spike, **values)
    for n in range(8):
        assert go(one, vote(2.0 + 0.01 * (n % 3))).is_applied
    return one


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (vote(loss_ok=False), "loss"),
        (vote(gradient_ok=False), "gradient"),
        (vote(math.nan, loss_ok=False, gradient_ok=False), "loss"),
    ],
)
def test_what_is_not_finite_is_skipped_and_named(bad, reason):
    one = policy()
    verdict = go(one, bad)
    assert (verdict.action, verdict.reason) == (Action.SKIP, reason)
    assert one.counts.skipped_steps == 1
    assert one.state()["losses"] == []


def test_the_run_stops_after_so_many_in_a_row_and_not_after_as_many_apart():
    one = policy(max_skipped_in_a_row=3)
    bad = vote(gradient_ok=False)
    for _ in range(4):
        go(one, bad)
        go(one, bad)
        go(one, vote())
    go(one, bad)
    go(one, bad)
    with pytest.raises(
        DivergedError, match=r"3 steps in a row.*the gradient is not finite at step 31.*optim.lr"
    ):
        go(one, bad, step=31)
    assert one.counts.skipped_steps == 11


@pytest.mark.parametrize(
    ("on_spike", "action"), [("log", Action.APPLY), ("skip", Action.SKIP), ("rollback", Action.ROLL_BACK)]
)
def test_a_spike_is_dealt_with_as_configured(on_spike, action):
    one = settled(on_spike)
    verdict = go(one, vote(20.0))
    assert (verdict.action, verdict.reason) == (action, "spike")
    assert verdict.z_score > 8
    assert one.counts.spikes == 1
    assert one.counts.skipped_steps == (on_spike == "skip")
    assert one.counts.rollbacks == (on_spike == "rollback")
    assert (20.0 in one.state()["losses"]) == (on_spike == "log")


def test_without_a_checkpoint_a_spike_is_skipped():
    assert go(settled("rollback"), vote(20.0), can_roll_back=False).action is Action.SKIP


def test_a_falling_loss_is_no_spike():
    assert go(settled("skip"), vote(0.1)).is_applied


def test_rollbacks_come_to_an_end():
    one = settled("rollback", max_rollbacks=2)
    for _ in range(2):
        go(one, vote(20.0))
        one.rewind(one.state())
    with pytest.raises(DivergedError, match="after 2 rollbacks"):
        go(one, vote(20.0))


def test_what_a_checkpoint_keeps_decides_as_the_policy_it_came_from():
    one = settled("skip")
    go(one, vote(loss_ok=False))
    again = FaultPolicy(one.config, json.loads(json.dumps(one.state())))
    for loss in (2.01, 2.3, 2.0, 9.0, 2.02, 2.05):
        assert go(again, vote(loss)) == go(one, vote(loss))
    assert again.state() == one.state()


def test_going_back_restores_the_losses_and_keeps_the_counts():
    one = settled("rollback")
    saved = one.state()
    for _ in range(3):
        go(one, vote(2.02))
    go(one, vote(loss_ok=False))
    go(one, vote(20.0))
    one.rewind(saved)
    assert one.state()["losses"] == saved["losses"]
    assert (one.counts.rollbacks, one.counts.skipped_steps, one.counts.skipped_in_a_row) == (1, 1, 0)
