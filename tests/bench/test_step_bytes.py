import dataclasses

import pytest

from tide_mega.config.schema import ModelConfig
from tide_mega.lab.bench.step_bytes import OPTIMIZER, StepShape, memory_bytes, predict

MODEL = ModelConfig(
    name="hand",
    num_layers=3,
    hidden_size=8,
    ffn_hidden_size=16,
    num_attention_heads=2,
    num_query_groups=2,
    vocab_size=100,
)
SHAPE = StepShape(
    MODEL,
    blocks=2,
    tokens=20,
    accumulation=4,
    micro_types=7,
    step_types=11,
    element=2,
    router_in_norm=False,
    owned=False,
)


def test_every_term_of_a_hand_case():
    hidden, logits, alpha, index = 20 * 8 * 2, 20 * 3 * 2, 20 * 3 * 4, 20 * 4
    micro_rows, step_rows, table = 7 * 2 * 8, 11 * 2 * 8, 100 * 2 * 8
    layers = 4 * 3
    assert memory_bytes(SHAPE) == {
        "row plan": 4 * 20 * 24,
        "gather and norm": 4 * step_rows * 2,
        "router forward": layers * (hidden + logits),
        "mix forward": layers * (micro_rows * 2 + logits + alpha + index),
        "mix backward": layers * (hidden + micro_rows * 2 + alpha + logits + index),
        "router backward": layers * (3 * hidden + 2 * logits),
        "row gradient": 4 * (3 * (hidden + alpha) + micro_rows * 8),
        "norm backward": step_rows * (4 + 2 + 2),
        "tables' gradient": table * 2,
        OPTIMIZER: table * (2 + 2 + 8 + 16 + 2),
    }


def test_a_router_in_the_norm_reads_its_input_once_for_its_own_gradient():
    apart, shared = memory_bytes(SHAPE), memory_bytes(dataclasses.replace(SHAPE, router_in_norm=True))
    hidden, logits = 20 * 8 * 2, 20 * 3 * 2
    assert shared["router forward"] == 4 * 3 * logits
    assert shared["router backward"] == 4 * 3 * (hidden + 2 * logits)
    routers = {"router forward", "router backward"}
    assert {k: v for k, v in apart.items() if k not in routers} == {
        k: v for k, v in shared.items() if k not in routers
    }


def test_fp32_has_no_weights_beside_the_master():
    assert memory_bytes(dataclasses.replace(SHAPE, element=4))[OPTIMIZER] == 1600 * (4 + 4 + 8 + 16)


@pytest.mark.parametrize("element", [2, 4])
def test_owners_touch_the_rows_of_the_step_and_adamw_the_whole_fp32_tables(element):
    shape = dataclasses.replace(SHAPE, owned=True, element=element)
    shared = memory_bytes(dataclasses.replace(shape, owned=False))
    step_rows, table = 11 * 2 * 8, 100 * 2 * 8
    assert memory_bytes(shape) == shared | {
        "tables' gradient": step_rows * (element + 4 + 4),
        OPTIMIZER: table * (4 + 8 + 16) + step_rows * (4 + 8 + 4),
    }


def test_without_blocks_nothing_moves():
    assert memory_bytes(dataclasses.replace(SHAPE, blocks=0)) == {}


def test_prediction_by_hand():
    found = predict(SHAPE, seq_length=10, bandwidth=1e9, tflops=2.0, mfu=0.5, share=0.25, replicas=4)
    parameters = 3 * (4 * 8 * 8 + 3 * 8 * 16) + 100 * 8
    flops = 20 * 4 * (6 * parameters + 12 * 3 * 8 * 10)
    assert found.base_seconds == pytest.approx(flops / 1e12)
    count = memory_bytes(SHAPE)
    assert found.seconds["mix forward"] == pytest.approx(count["mix forward"] / 0.25e9)
    assert found.seconds[OPTIMIZER] == pytest.approx(count[OPTIMIZER] / 0.25e9 / 4)
    assert found.overhead == pytest.approx(sum(found.seconds.values()) / found.base_seconds)
    assert found.seconds[found.dominating] == max(found.seconds.values())


def test_more_microbatches_spread_the_optimizer_but_not_the_layers():
    model = dataclasses.replace(MODEL, vocab_size=128_256)
    one, eight = (
        predict(
            dataclasses.replace(StepShape.expected(model, 8, 2048, accumulation), owned=False),
            seq_length=64,
            bandwidth=1e12,
            tflops=100,
            mfu=0.5,
            share=1.0,
        )
        for accumulation in (1, 8)
    )
    assert (one.shape.micro_types, one.shape.step_types) == (620, 620)
    assert eight.shape.micro_types == 620 < eight.shape.step_types
    shares = [p.seconds[OPTIMIZER] / p.base_seconds for p in (one, eight)]
    assert shares[0] == pytest.approx(8 * shares[1])
    assert one.seconds["mix backward"] * 8 == pytest.approx(eight.seconds["mix backward"])
