import pytest
import torch

from tide_mega.config.device_memory import state_bytes
from tide_mega.config.hydra_door import compose
from tide_mega.lab.bench import step_measure as step_rounds
from tide_mega.lab.bench.step_measure import measure_rounds, plan_rounds

REGIONS = ("gradients", "optimizer", "total")


@pytest.fixture(scope="module")
def configs():
    return {
        k: compose(["model=demo", "data=demo", "trainer=demo", f"memory.num_blocks={k}"], validate=False)
        for k in (0, 2, 4)
    }


def room_for(configs, *blocks):
    return int(sum(state_bytes(configs[k], 1) for k in blocks) / step_rounds.STATE_SHARE) + 1


def test_all_share_a_round_where_they_fit(configs):
    assert plan_rounds(configs, None) == ([[0, 2, 4]], {})
    assert plan_rounds(configs, room_for(configs, 0, 2, 4)) == ([[0, 2, 4]], {})


def test_less_room_pairs_each_with_the_base_or_brackets_it_or_leaves_it_out(configs):
    assert plan_rounds(configs, room_for(configs, 0, 4)) == ([[0], [0, 2], [0, 4]], {})
    assert plan_rounds(configs, room_for(configs, 4)) == ([[0], [0, 2], [4], [0]], {})
    rounds, left_out = plan_rounds(configs, room_for(configs, 2))
    assert rounds == [[0], [2], [0]]
    assert "optimizer state need" in left_out[4]


def line(blocks, total):
    seconds = {region: {"median": total, "low": total, "high": total} for region in REGIONS}
    return {"blocks": blocks, "seconds": seconds, "floor_bytes": {"mix forward": 30} if blocks else {}}


def run(monkeypatch, configs, rounds, seconds, fails=()):
    """Measure with made-up seconds, one for each K of each round in turn; rounds in `fails` run out of memory."""
    asked, times = [], iter(seconds)

    def measure(members, _device):
        asked.append(list(members))
        if list(members) in list(fails):
            raise torch.OutOfMemoryError("full")
        return [line(k, next(times)) for k in members]

    monkeypatch.setattr(step_rounds, "plan_rounds", lambda *_: (rounds, {}))
    monkeypatch.setattr(step_rounds, "measure_together", measure)
    return (*measure_rounds(configs, None, None, 100.0), asked)


def test_overhead_is_over_the_base_of_the_same_round(monkeypatch, configs):
    lines, _, _ = run(monkeypatch, configs, [[0], [0, 2], [0, 4]], [9.0, 10.0, 11.0, 20.0, 25.0])
    assert [found["blocks"] for found in lines] == [0, 2, 4]
    assert [found["overhead"] for found in lines] == pytest.approx([0.0, 0.1, 0.25])
    assert lines[1]["floor_overhead"] == pytest.approx(0.3 / 10)


def test_one_alone_is_compared_with_the_base_before_and_after(monkeypatch, configs):
    lines, _, _ = run(monkeypatch, configs, [[0], [4], [0]], [10.0, 24.0, 14.0])
    assert [found["overhead"] for found in lines] == pytest.approx([0.0, 1.0])


def test_a_round_out_of_memory_is_run_one_by_one(monkeypatch, configs):
    lines, left_out, asked = run(
        monkeypatch, configs, [[0, 2, 4]], [10.0, 11.0, 10.0], fails=([0, 2, 4], [4])
    )
    assert asked == [[0, 2, 4], [0], [2], [4], [0]]
    assert [found["blocks"] for found in lines] == [0, 2]
    assert left_out == {4: "a step runs out of memory: give a smaller micro_batch"}


def test_a_base_out_of_memory_ends_it(monkeypatch, configs):
    with pytest.raises(RuntimeError, match="K=0 runs out of memory: give a smaller micro_batch"):
        run(monkeypatch, configs, [[0, 2]], [], fails=([0, 2], [0]))
