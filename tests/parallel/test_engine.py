"""What DeepSpeed's engine is told beyond its numerics, and the weights that are updated beside it."""

import math
import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from tide_mega.config.schema import OptimConfig, ParallelConfig
from tide_mega.lab.parity.case import Case, configuration
from tide_mega.parallel.device import Device, choose_device
from tide_mega.parallel.engine import Engine
from tide_mega.parallel.engine_settings import EngineOptions, ParameterGroup
from tide_mega.parallel.groups import make_groups
from tide_mega.training.setup import build_engine, build_stage


def build_and_look(case, index):
    """Build an engine on the `index`-th device; return what DeepSpeed took of it, and LOCAL_RANK afterwards."""
    config = configuration(case)
    stage = build_stage(config, make_groups(config.parallel, 1), choose_device("cpu", 0))
    engine = build_engine(config, stage, Device(torch.device("cpu", index), "gloo", "cpu"), case.accumulation)
    try:
        inside = engine._engine
        return inside.tput_timer.config.enabled, inside.local_rank, os.environ["LOCAL_RANK"]
    finally:
        engine.close()


def test_no_timer_of_deepspeed_waits_for_the_device(pools):
    assert [enabled for enabled, *_ in pools(2).run(build_and_look, Case(data=2), None)] == [False, False]


def test_deepspeed_takes_the_chosen_device_and_not_the_local_rank(pools):
    case = replace(Case(data=2), num_blocks=0)
    assert pools(2).run(build_and_look, case, 0) == [(False, 0, "0"), (False, 0, "1")]
    assert pools(2).run(build_and_look, case, None) == [(False, 0, "0"), (False, 1, "1")]


class Outside:
    """Weights outside DeepSpeed that keep what they are told."""

    def __init__(self, gradient):
        self.gradient, self.told = torch.tensor(gradient, dtype=torch.float64), []

    def square_norm(self):
        return self.gradient.square().sum()

    def step(self, lr, scale):
        self.told.append(("step", lr, scale))

    def drop_gradient(self):
        self.gradient.zero_()
        self.told.append(("drop",))


OPTIM = OptimConfig(weight_decay=0.0)
LR = 0.01


def with_outside(clip_grad, outside_by_rank, what="step"):
    """Give four weights the mean gradient (1, 2, 2, 4) over two replicas, whose norm is 5; one step, or a skip.

    Returns the norm reported, what the weights outside were told, Adam's first moment of this rank's weights
    without its factor 1 - beta1, and whether the update was made.
    """
    rank = dist.get_rank()
    model = torch.nn.Linear(4, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    gradient = outside_by_rank[rank]
    outside = None if gradient is None else Outside(gradient)
    options = EngineOptions(1, "fp32", clip_grad, micro_batch_size=1, accumulation=1, shares_norm=True)
    groups = [ParameterGroup("weights", [model.weight], weight_decay=0.0)]
    engine = Engine(
        model, groups, OPTIM, options, make_groups(ParallelConfig(), 1), choose_device("cpu", 0), outside
    )
    try:
        with engine.accumulate():
            # The replicas differ; their mean is what counts.
            input_4 = torch.tensor([1.0, 2.0, 2.0, 4.0]) + (1 if rank else -1)
            engine(input_4).sum().backward()
        made = engine.step(LR) if what == "step" else engine.skip()
        kept = engine.state.kept(model.weight)
        moment = (kept.exp_avg / (1 - OPTIM.beta1)).tolist()
        return engine.grad_norm(), None if outside is None else outside.told, moment, made
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("clip_grad", "outside_by_rank", "norm", "factor"),
    [
        (6.5, ([12.0], None), 13.0, 0.5),  # 5² + 12² = 13²
        (6.5, ([8.0], [64**0.5, 4.0]), 13.0, 0.5),  # 5² + 8² + 8² + 4² = 13²
        (13.5, ([12.0], None), 13.0, 1.0),
        (0.0, ([12.0], None), 13.0, 1.0),
        (2.5, ([0.0], [0.0]), 5.0, 0.5),
    ],
)
def test_weights_outside_share_one_norm_and_one_factor(pools, clip_grad, outside_by_rank, norm, factor):
    results = pools(2).run(with_outside, clip_grad, outside_by_rank)
    moments = []
    for (reported, told, moment, made), gradient in zip(results, outside_by_rank, strict=True):
        assert reported == pytest.approx(norm)
        assert made
        moments += moment
        if gradient is None:
            assert told is None
        else:
            ((called, lr, scale),) = told
            assert (called, lr) == ("step", LR)
            assert scale == pytest.approx(factor, rel=1e-6)
            assert factor < 1 or scale == 1
    assert moments == pytest.approx([factor * g for g in (1.0, 2.0, 2.0, 4.0)], rel=1e-6)


@pytest.mark.parametrize("what", ["step", "skip"])
def test_a_step_that_is_not_made_drops_the_gradient_outside_at_once(pools, what):
    bad = ([math.nan], [1.0]) if what == "step" else ([12.0], [1.0])
    for norm, told, moment, made in pools(2).run(with_outside, 1.0, bad, what):
        assert norm == math.inf
        assert told == [("drop",)]
        assert not any(moment)
        assert not made
