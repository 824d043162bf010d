import json
import math
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tide_mega.checkpoint import TrainingState
from tide_mega.data.loader import TokenBatch
from tide_mega.model.steps import StepResult
from tide_mega.training.report import LossWindow

BINS = torch.tensor([*range(10), -1, -2], dtype=torch.int8)
Z_LOSS = 0.5


class Alone:
    def size(self):
        return 1


def window(*, by_decile=True, restores=True):
    groups = SimpleNamespace(data=Alone(), pipeline=Alone())
    return LossWindow(Z_LOSS, groups, BINS, by_decile=by_decile, restores=restores)


def step(seed, microbatches=2):
    """A step's sums and microbatches; losses as a model has them, a tenth of the labels left out."""
    generator = torch.Generator().manual_seed(seed)
    losses, batches = [], []
    for _ in range(microbatches):
        labels_BT = torch.randint(0, 12, (2, 5), generator=generator)
        labels_BT[torch.rand(2, 5, generator=generator) < 0.1] = -1
        loss_BT = torch.randn(2, 5, generator=generator).mul(2).exp()
        losses.append(loss_BT * (labels_BT >= 0))
        batches.append(TokenBatch(labels_BT.clamp(min=0), labels_BT))
    tokens = torch.stack([(batch.labels_BT >= 0).sum() for batch in batches]).sum()
    loss_sum = torch.stack([loss.sum() for loss in losses]).sum()
    return StepResult(loss_sum, loss_sum * 3, tokens, losses), batches


def saved(window, step):
    state = TrainingState(step=step)
    window.keep(state)
    return TrainingState(**json.loads(json.dumps(asdict(state))))


def test_means_are_over_the_tokens_of_the_added_steps():
    w = window()
    labels_BT = torch.tensor([[0, 9, -1, 10]])
    loss_BT = torch.tensor([[4.0, 1.0, 0.0, 2.5]])
    total, tokens = loss_BT.sum(), torch.tensor(3)
    w.add(StepResult(total, total, tokens, [loss_BT]), [TokenBatch(labels_BT, labels_BT)])
    w.add(StepResult(total, total, tokens, [2 * loss_BT]), [TokenBatch(labels_BT, labels_BT)])
    means = w.means()
    assert (means.loss, means.z_loss) == (7.5 / 3, 0.5 * 7.5 / 3)
    by_bin = {slot: loss for slot, loss in means.deciles.loss_by_bin.items() if loss is not None}
    assert by_bin == {"0": 6.0, "9": 1.5, "dropped": 3.75}
    assert (means.deciles.rare, means.deciles.mid, means.deciles.common) == (6.0, None, 1.5)
    assert means.deciles.count_by_bin["0"] == means.deciles.count_by_bin["9"] == 2
    w.restart(8)
    assert math.isnan(w.means().loss) and w.means().deciles.loss is None and w.first_step == 9


@settings(deadline=None, max_examples=40)
@given(
    seeds=st.lists(st.integers(0, 2**31), min_size=1, max_size=6), at=st.integers(0, 6), order=st.randoms()
)
def test_any_order_and_any_stop_give_the_same_bits(seeds, at, order):
    whole, broken = window(), window()
    steps = [step(seed) for seed in seeds]
    for one in steps:
        whole.add(*one)
    order.shuffle(steps)
    for one in steps[:at]:
        broken.add(*one)
    resumed, other_rank = window(), window(restores=False)
    for w in (resumed, other_rank):
        w.restore(saved(broken, step=3))
    assert other_rank.means().deciles.tokens == 0
    for number, one in enumerate(steps[at:]):
        (resumed, other_rank)[number % 2].add(*one)
    merged = [a + b for a, b in zip(_sums(resumed), _sums(other_rank), strict=True)]
    assert [part.tolist() for part in merged] == [part.tolist() for part in _sums(whole)]


def _sums(window):
    return window._deciles.reduced(lambda tensor: tensor)


@settings(deadline=None, max_examples=30)
@given(seeds=st.lists(st.integers(0, 2**31), min_size=1, max_size=5))
def test_counts_times_means_are_the_whole(seeds):
    w = window()
    for seed in seeds:
        w.add(*step(seed, microbatches=3))
    means = w.means()
    counts, losses = means.deciles.count_by_bin, means.deciles.loss_by_bin
    total = math.fsum(counts[slot] * losses[slot] for slot in counts if counts[slot])
    assert total == pytest.approx(means.deciles.loss * means.deciles.tokens, rel=1e-14)
    assert means.deciles.loss == pytest.approx(means.loss, rel=1e-6)


def test_stages_before_the_last_add_no_losses():
    w = window()
    zero = torch.zeros(())
    w.add(StepResult(zero, zero, zero, []), step(1)[1])
    assert w.means().deciles.tokens == 0


def test_a_checkpoint_without_sums_by_decile_starts_their_window_anew_and_says_so():
    before = window(by_decile=False)
    before.add(*step(1))
    state = saved(before, step=3)
    assert "loss_by_decile" not in state.extra
    after = window()
    after.restore(state)
    assert after.first_step == 4
    after.add(*step(2))
    means = after.means()
    assert means.deciles.tokens == int(step(2)[0].tokens)
    both = [step(1)[0], step(2)[0]]
    assert means.loss == pytest.approx(
        sum(float(one.loss_sum) for one in both) / sum(int(one.tokens) for one in both), rel=1e-6
    )


def test_sums_of_a_run_that_was_told_to_stop_keeping_them_do_not_stay_behind():
    first = window()
    first.add(*step(1))
    state = saved(first, step=3)
    second = window(by_decile=False)
    second.restore(state)
    second.keep(state)
    assert state.extra == {}
    assert second.means().deciles is None
