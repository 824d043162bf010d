"""Times that follow from counts, against numbers worked out by hand."""

import math
from collections import Counter
from dataclasses import replace

import pytest

from tide_mega.config.hydra_door import compose
from tide_mega.config.sizes import flops_per_token
from tide_mega.dryrun.ledger import BACKWARD, FORWARD, REDUCE, UPDATE, Instant, Message, Moved, Peak, Work
from tide_mega.errors import ConfigError
from tide_mega.plan.estimate import estimate, kernel_seconds, message_seconds, phase_time
from tide_mega.plan.options import PlanOptions, distinct_ranks, split_words
from tide_mega.plan.rank import RankStep
from tide_mega.plan.rates import rates_of

ROUND = rates_of(
    "h100",
    memory_gbs=1000,
    memory_share=0.5,
    kernel_us=1,
    launch_us=10,
    wait_us=100,
    nvlink_gbs=100,
    network_gbs=10,
    link_share=1,
    nvlink_us=10,
    network_us=20,
    disk_gbs=1,
)
"""Numbers to reckon with."""


def rank_step(**changes):
    step = RankStep(
        rank=0,
        stage=0,
        tensor_rank=0,
        microbatches=4,
        elements=0,
        built={},
        peaks={FORWARD: Peak(10, {"weights": 10}, {})},
        instants=[Instant(FORWARD, {"weights": 10})],
        work=Counter(),
        launches=Counter(),
        messages={},
        waits=Counter(),
        traffic={},
        seconds=1.0,
    )
    return replace(step, **changes)


def test_a_kernel_takes_its_traffic_its_arithmetic_or_the_least_time():
    traffic = Work(FORWARD, "mul", 0, 5_000_000_000, 0, 0)
    assert kernel_seconds(traffic, ROUND) == pytest.approx(0.01)
    assert kernel_seconds(replace(traffic, bytes=8), ROUND) == pytest.approx(1e-6)
    large = Work(FORWARD, "mm", 989 * 10**12, 10, 4096, 2)
    assert kernel_seconds(large, ROUND) == pytest.approx(1 / 0.70)
    assert kernel_seconds(replace(large, smallest=64), ROUND) == pytest.approx(1 / 0.15)
    assert kernel_seconds(replace(large, name="_flash_attention"), ROUND) == pytest.approx(1 / 0.34)
    assert kernel_seconds(replace(large, width=4), ROUND) == pytest.approx(989 / 67 / 0.70)


@pytest.mark.parametrize(
    ("name", "group", "seconds"),
    [
        ("allreduce_", range(8), 2 * 10e-6 + 2 * 7 / 8 * 0.01),
        ("_allgather_base_", range(8), 2 * 10e-6 + 7 / 8 * 0.01),
        ("alltoall_base_", range(0, 64, 2), 2 * 20e-6 * 3 + 31 / 32 * 0.1),
        ("send", (0, 8), 2 * 20e-6 + 0.1),
        ("broadcast_", (3, 4), 2 * 10e-6 + 0.01),
        ("allreduce_", (5,), 0.0),
    ],
)
def test_a_collective_takes_its_share_of_the_slowest_link(name, group, seconds):
    message = Message(FORWARD, name, "here", tuple(group))
    assert message_seconds(message, Moved(2, 10**9), ROUND) == pytest.approx(seconds)


def test_a_phase_is_bound_by_its_launches_if_they_outlast_its_kernels():
    work = Counter({Work(FORWARD, "mul", 0, 500_000, 0, 0): 100})
    busy = rank_step(work=work, launches=Counter({FORWARD: 5}))
    assert phase_time(busy, FORWARD, ROUND).total == pytest.approx(1e-4)
    bound = phase_time(replace(busy, launches=Counter({FORWARD: 100})), FORWARD, ROUND)
    assert (bound.traffic, bound.launches, bound.total) == pytest.approx((1e-4, 9e-4, 1e-3))


def test_a_job_waits_for_its_slowest_stage_and_the_pipeline_fills_and_drains():
    config = compose(
        ["experiment=tide_8e_1b", "data.path=none", "parallel=tp2_pp2", "trainer.global_batch_size=32"],
        world_size=8,
    )
    group = tuple(range(8))
    fast = rank_step(work=Counter({Work(FORWARD, "mul", 0, 10**9, 0, 0): 1}))
    slow = rank_step(
        stage=1,
        work=Counter(
            {Work(FORWARD, "mul", 0, 10**10, 0, 0): 1, Work(BACKWARD, "mul", 0, 2 * 10**10, 0, 0): 1}
        ),
        messages={Message(REDUCE, "allreduce_", "here", group): Moved(1, 10**9)},
    )
    found = estimate(config, 8, [fast, slow], ROUND)
    schedule, reduction = 0.06, 10e-6 + 2 * 7 / 8 * 0.01
    assert found.bubble == pytest.approx(schedule / 4)
    assert found.seconds == pytest.approx(schedule * 1.25 + reduction)
    assert sum(found.parts().values()) == pytest.approx(found.seconds)
    tokens = 32 * config.data.seq_length
    assert found.tokens_per_second == pytest.approx(tokens / found.seconds)
    flops = flops_per_token(config.model, config.memory, config.data.seq_length)
    assert found.mfu == pytest.approx(found.tokens_per_second * flops / (8 * 989e12))
    assert found.hours == pytest.approx(200e9 / found.tokens_per_second / 3600)
    assert found.gpu_hours == pytest.approx(8 * found.hours)
    assert found.phases[UPDATE].total == 0


def test_words_of_the_plan_and_of_the_training_are_told_apart():
    words = ["experiment=tide_8e_1b", "nodes=4", "parallel.tensor=2", "gpu=b200", "--help", "network_gbs=25"]
    assert split_words(words) == (
        ["nodes=4", "gpu=b200", "--help", "network_gbs=25"],
        ["experiment=tide_8e_1b", "parallel.tensor=2"],
    )


def test_the_distinct_ranks_are_the_first_and_last_of_each_stage():
    words = ["experiment=tide_8e_1b", "data.path=none", "parallel=tp8_pp4"]
    assert distinct_ranks(compose(words, world_size=1024), 1024) == [0, 7, 256, 263, 512, 519, 768, 775]
    words = ["experiment=tide_8e_1b", "data.path=none"]
    assert distinct_ranks(compose(words, world_size=64), 64) == [0]


def test_rates_that_are_given_replace_the_data_sheet():
    assert rates_of("b200").nvlink_gbs == 900
    assert PlanOptions(gpu="h200", network_gbs=25.0).rates().network_gbs == 25
    with pytest.raises(ConfigError, match="gpu=v100 is not known: use one of"):
        rates_of("v100")
    with pytest.raises(ConfigError, match="network_gbs=0 is no rate"):
        rates_of("h100", network_gbs=0)
    with pytest.raises(ConfigError, match="ranks=64 is none of the job's: they are 0 to 63"):
        PlanOptions(nodes=8, ranks=[64]).check()
    assert math.isclose(rates_of("h100").peak(2), 989e12)
