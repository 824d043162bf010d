"""The vote in real processes: what one rank sees, all ranks hear alike."""

import math
import random

import pytest
import torch
import torch.distributed as dist

from tide_mega.model.steps import StepResult
from tide_mega.training.faults.policy import take_vote


def vote_of(cases):
    loss, z_square, tokens, finite = cases[dist.get_rank()]
    result = StepResult(torch.tensor(loss), torch.tensor(z_square), torch.tensor(tokens), [])
    return take_vote(result, torch.tensor(finite), 0.5 + dist.get_rank())


def test_losses_are_averaged_over_tokens_and_all_ranks_agree_to_the_last_bit(pools):
    draw = random.Random(3)
    cases = [(draw.uniform(50, 200), 1.0, draw.randint(20, 60), True) for _ in range(2)]
    votes = pools(2).run(vote_of, cases)
    assert votes[0] == votes[1]
    sums = [float(torch.tensor(case[0])) for case in cases]
    assert votes[0].loss == pytest.approx(sum(sums) / (cases[0][2] + cases[1][2]), rel=1e-15)
    assert votes[0].is_loss_finite and votes[0].is_gradient_finite
    assert votes[0].seconds_by_rank == [0.5, 1.5]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("part", [0, 1])
def test_a_loss_or_log_partition_that_is_not_finite_on_one_rank_is_left_out_and_told(pools, bad, rank, part):
    cases = [[80.0, 1.0, 40, True], [60.0, 1.0, 40, True]]
    cases[rank][part] = bad
    votes = pools(2).run(vote_of, cases)
    assert votes[0] == votes[1]
    assert not votes[0].is_loss_finite and votes[0].is_gradient_finite
    assert votes[0].loss == cases[1 - rank][0] / 40


def test_a_gradient_that_is_not_finite_on_one_rank_is_told(pools):
    votes = pools(2).run(vote_of, [(80.0, 1.0, 40, True), (60.0, 1.0, 40, False)])
    assert votes[0] == votes[1]
    assert votes[0].is_loss_finite and not votes[0].is_gradient_finite


def test_stages_without_a_loss_do_not_weigh(pools):
    votes = pools(2).run(vote_of, [(0.0, 0.0, 0, True), (90.0, 1.0, 30, True)])
    assert [vote.loss for vote in votes] == [3.0, 3.0]
