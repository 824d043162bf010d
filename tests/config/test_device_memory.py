"""What a step needs of a device: every term against numbers made by hand."""

import re
from pathlib import Path

import pytest

from tide_mega.config import device_memory
from tide_mega.config.device_memory import (
    StageParameters,
    activation_bytes,
    backward_gradients,
    distinct_types,
    layer_bytes,
    layers_in_flight,
    loss_bytes,
    reduction_bytes,
    row_bytes,
    stage_parameters,
    state_bytes,
    update_bytes,
    working_bytes,
)
from tide_mega.config.hydra_door import compose
from tide_mega.config.sizes import count_parameters
from tide_mega.errors import ConfigError

ROOT = Path(__file__).parents[2]
REPLICATED = "memory.owners=tensor"
SMALL = (
    *("model.num_layers=4", "model.hidden_size=8", "model.ffn_hidden_size=12", "model.num_attention_heads=4"),
    *("model.num_query_groups=2", "model.vocab_size=1000", "trainer.precision=bf16"),
    *("trainer.micro_batch_size=2", "data.seq_length=16", REPLICATED),
)
LAYER = (8 * 8 + 8 * 4 + 8 * 4 + 8 * 8) + 3 * 8 * 12
"""Elements of a layer's matrices; its two norms have 16 more, and the embedding 8,000."""


def small(*overrides):
    return compose([*SMALL, *overrides], validate=False)


def parameters_of(*overrides, stage=0):
    return stage_parameters(small(*overrides), stage)


def test_the_stage_of_one_has_everything():
    assert parameters_of() == StageParameters(4 * (LAYER + 16) + 8000 + 8, 0, 8000)
    with_tables = parameters_of("memory.num_blocks=3")
    assert with_tables == StageParameters(4 * (LAYER + 16 + 4 * 8) + 8000 + 8 + 3 * 8, 3 * 8000, 8000)
    untied = parameters_of("model.tie_embeddings=false")
    assert untied.dense - parameters_of().dense == 8000


def test_two_stages_split_the_layers_and_the_last_has_the_final_norm():
    # Tied: each stage has a copy of the embedding's matrix, and the last also the final norm.
    for tied in ("true", "false"):
        words = ("parallel=pp2", f"model.tie_embeddings={tied}", "memory.num_blocks=3")
        dense = 2 * (LAYER + 16 + 4 * 8) + 8000
        assert parameters_of(*words) == StageParameters(dense + 3 * 8, 3 * 8000, 8000)
        assert parameters_of(*words, stage=1) == StageParameters(dense + 8, 0, 8000)


def test_a_middle_stage_has_layers_alone_and_its_largest_weight_is_gate_and_up():
    words = ("parallel.pipeline=4", "memory.num_blocks=3")
    assert parameters_of(*words, stage=1) == StageParameters(LAYER + 16 + 4 * 8, 0, 2 * 8 * 12)


def test_tensor_parallelism_divides_all_but_norms_routers_and_gains():
    config = compose(["memory=k2", REPLICATED, "parallel=tp4"])
    count, parameters = count_parameters(config.model, config.memory), stage_parameters(config, 0)
    replicated = count.norms + count.routers + count.memory_gains
    assert parameters.total == (count.total - replicated) // 4 + replicated
    assert parameters.largest == count.embedding // 4


def test_the_chunks_of_an_interleaved_stage_add_up_to_the_same():
    assert parameters_of("parallel=pp2_interleaved") == parameters_of("parallel=pp2")


def test_rows_with_one_owner_are_not_deepspeeds():
    config = small("memory.num_blocks=3", "memory.owners=tensor_data", "parallel=tp2")
    assert stage_parameters(config, 0).tables == 0
    # 6 processes: tensor 2 x data 3; 1,000 rows over 6 owners are 167 at most.
    assert device_memory.device_memory(config, 6).owned_rows == 16 * 167 * 3 * 8
    assert device_memory.device_memory(small("parallel=tp2"), 6).owned_rows == 0


def test_owners_are_those_of_the_first_stage():
    words = ("parallel=tp2_pp2", "memory.num_blocks=3", "memory.owners=tensor_data")
    first, last = (device_memory._on_stage(small(*words), 8, stage) for stage in (0, 1))
    assert (first.owned_rows, last.owned_rows) == (16 * 250 * 3 * 8, 0)


@pytest.mark.parametrize(
    ("stage", "precision", "world", "weights", "optimizer"),
    [
        (1, "bf16", 1, 2, 12),
        (1, "bf16", 4, 2, 3),
        (2, "bf16", 4, 2, 3),
        (1, "fp32", 2, 4, 6),
        (3, "bf16", 4, 0.5, 3),
        (3, "fp32", 2, 2, 6),
    ],
)
def test_zero_shards_the_optimizer_and_at_stage_3_the_weights(stage, precision, world, weights, optimizer):
    config = small(f"parallel.zero_stage={stage}", f"trainer.precision={precision}")
    parameters, found = stage_parameters(config, 0).total, device_memory.device_memory(config, world)
    assert found.weights == pytest.approx(weights * parameters, abs=4)
    assert found.optimizer == pytest.approx(optimizer * parameters, abs=4)


def test_zero_3_keeps_a_bucket_its_gradients_and_gathered_weights():
    config = small("parallel.zero_stage=3")
    parameters = stage_parameters(config, 0).total
    buffers = device_memory.device_memory(config, 4).buffers
    assert buffers == 2 * (parameters + parameters // 4 + parameters)
    assert device_memory.device_memory(small("parallel.zero_stage=2"), 4).buffers == 0
    whole = compose(["model=3b", "memory=none", "parallel=zero3"])
    parameters = stage_parameters(whole, 0).total
    at_most = 2 * (500_000_000 + parameters // 64 + 1_000_000_000)
    assert device_memory.device_memory(whole, 64).buffers == at_most


SIZES = StageParameters(dense=1000, tables=300, largest=200)


@pytest.mark.parametrize(
    ("stage", "precision", "batch", "expected"),
    [
        (1, "bf16", 2, 2 * 1000),  # one microbatch: bf16 gradients
        (1, "bf16", 4, 4 * 1000 + 2 * 200),  # two: their fp32 sum, and a weight's own
        (2, "bf16", 4, 4 * 1000 + 2 * 200),
        (3, "bf16", 4, 2 * 1000),  # in bf16, and whole all the same: reduced once a step
        (1, "fp32", 4, 4 * 1000),
        (3, "fp32", 4, 4 * 1000),
    ],
)
def test_gradients_of_a_backward_pass(stage, precision, batch, expected):
    words = (f"parallel.zero_stage={stage}", f"trainer.precision={precision}")
    config = small(*words, f"trainer.global_batch_size={batch}")
    assert backward_gradients(config, 1, SIZES) == expected


@pytest.mark.parametrize(
    ("words", "world", "expected"),
    [
        # bf16 gradients, beside them two buckets of all and this replica's share of four
        (("trainer.global_batch_size=8",), 4, 2 * 1300 + 2 * (2 * 1300 + 325)),
        (("trainer.global_batch_size=8", "parallel.zero_stage=3"), 4, 2 * 1300 + 2 * (1300 + 325)),
        # alone, the share is all
        (("trainer.global_batch_size=2",), 1, 2 * 1300 + 2 * (2 * 1300 + 1300)),
        (("trainer.global_batch_size=2", "trainer.precision=fp32"), 1, 4 * 1300 + 4 * (2 * 1300 + 1300)),
        # two microbatches: the fp32 sums being rounded are less than that
        (("trainer.global_batch_size=4",), 1, 2 * 1300 + 2 * (2 * 1300 + 1300)),
    ],
)
def test_bytes_of_the_reduction(words, world, expected):
    assert reduction_bytes(small(*words), world, SIZES) == expected


def test_a_large_model_is_rounded_beside_its_sums_and_reduced_in_buckets_of_half_a_billion():
    sizes = StageParameters(dense=3 * 10**9, tables=0, largest=4 * 10**8)
    config = small("trainer.global_batch_size=8192")
    assert reduction_bytes(config, 64, sizes) == (2 + 4) * 3 * 10**9
    one = small("trainer.global_batch_size=128")
    assert reduction_bytes(one, 64, sizes) == 2 * 3 * 10**9 + 2 * (10**9 + 3 * 10**9 // 64)


def test_bytes_of_the_update():
    assert update_bytes(small(), 1, SIZES) == (2 + 4) * 1300
    assert update_bytes(small(), 4, SIZES) == (2 + 4) * 1300 // 4
    assert update_bytes(small("trainer.precision=fp32"), 4, SIZES) == (4 + 4) * 1300 // 4


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        # x, its norm, h, its norm; q k v, q, k, out; gate, up, product; norms and softmax
        ((), 2 * (4 * 8 + (16 + 8 + 4 + 8) + 3 * 12) + 4 * (2 + 4)),
        (("memory.num_blocks=3",), 2 * (4 * 8 + (16 + 8 + 4 + 8) + 3 * 12) + 4 * (2 + 4 + 4)),
        (("kernels.compile=false",), 2 * (4 * 8 + (16 + 8 + 4 + 8) + 5 * 12) + 4 * (2 + 4)),
        (("trainer.precision=fp32",), 4 * (4 * 8 + (16 + 8 + 4 + 8) + 3 * 12) + 4 * (2 + 4)),
        (("parallel.tensor=2",), 2 * (4 * 8 + (16 + 8 + 4 + 8) // 2 + 3 * 6) + 4 * (2 + 2)),
        (
            ("parallel.tensor=2", "parallel.sequence_parallel=true"),
            2 * (4 * 4 + (16 + 8 + 4 + 8) // 2 + 3 * 6) + 4 * (1 + 2),
        ),
        (("parallel.recompute=selective",), 2 * (4 * 8 + 16 + 8 + 8) + 4 * 2),
        (("parallel.recompute=selective", "parallel.tensor=2"), 2 * (4 * 8 + (16 + 8) // 2) + 4 * 2),
        (("parallel.recompute=full",), 2 * 8),
        (("parallel.recompute=full", "parallel=tp2"), 2 * 4),
    ],
)
def test_bytes_of_a_token_in_a_layer(words, expected):
    assert layer_bytes(small(*words)) == expected


@pytest.mark.parametrize(
    ("recompute", "again"),
    [
        ("none", 0),
        ("selective", 2 * 3 * 12),
        ("full", 2 * (4 * 8 + (16 + 8 + 4 + 8) + 3 * 12) + 4 * (2 + 4)),
    ],
)
def test_bytes_of_the_layer_in_work(recompute, again):
    assert working_bytes(small(f"parallel.recompute={recompute}")) == 2 * (3 * 12 + 4 * 8) + again


@pytest.mark.parametrize(
    ("words", "world", "by_stage"),
    [
        ((), 1, [4]),
        (("parallel.pipeline=2", "trainer.global_batch_size=16"), 2, [2 * 2, 2 * 1]),
        (("parallel.pipeline=4", "trainer.global_batch_size=16"), 4, [4, 3, 2, 1]),
        (("parallel.pipeline=4", "trainer.global_batch_size=4"), 4, [2, 2, 2, 1]),  # there are only two
        # Two chunks of one layer: 2 (2 - 1) + 2 + 1 ahead, then two fewer.
        (("parallel=pp2_interleaved", "trainer.global_batch_size=16"), 2, [5, 3]),
        (("parallel=pp2_interleaved", "trainer.global_batch_size=4"), 2, [4, 3]),
    ],
)
def test_layers_in_flight_of_each_stage(words, world, by_stage):
    config = small(*words)
    assert [layers_in_flight(config, world, stage) for stage in range(len(by_stage))] == by_stage


def test_activations_are_of_all_layers_in_flight_one_in_work_and_the_outputs():
    config = small("parallel.pipeline=2", "trainer.global_batch_size=16")
    tokens, each, work = 2 * 16, layer_bytes(config), working_bytes(config)
    assert activation_bytes(config, 2, 0) == tokens * (4 * each + work + 2 * 2 * 8)
    assert activation_bytes(config, 2, 1) == tokens * (2 * each + work + 2 * 8)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), 4 * 1000 * 8 + 2 * 2 * 32 * 8 + 32 * 1000 * 2),
        (("parallel=tp2",), 4 * 500 * 8 + 2 * 2 * 32 * 8 + 32 * 500 * 2),
        (("kernels.loss_tokens=10",), 4 * 1000 * 8 + 2 * 2 * 32 * 8 + 10 * 1000 * 2),
        (("kernels.compile=false",), 4 * 1000 * 8 + 2 * 2 * 32 * 8 + 32 * 1000 * (2 + 4)),
        (("trainer.precision=fp32",), 4 * 1000 * 8 + 2 * 4 * 32 * 8 + 32 * 1000 * 4),
        # 2^30 bytes hold 4,185 tokens' logits of 128,256 entries
        (
            ("model.vocab_size=128256", "trainer.micro_batch_size=8", "data.seq_length=2048"),
            4 * 128_256 * 8 + 2 * 2 * 16_384 * 8 + 4_185 * 128_256 * 2,
        ),
    ],
)
def test_bytes_of_the_loss(words, expected):
    assert loss_bytes(small(*words)) == expected


def test_the_loss_is_on_the_last_stage_and_reading_costs_most_on_the_first():
    config = small("parallel.pipeline=2", "memory.num_blocks=3")
    first, last = (device_memory._on_stage(config, 2, stage) for stage in (0, 1))
    assert (first.loss, last.loss) == (0, loss_bytes(config))
    assert first.rows > last.rows > 0


def test_bytes_of_a_reading():
    # 4 microbatches of 32 tokens: 8 x 128^(2/3) = 203 types at most, and no more than there are tokens.
    config = small("memory.num_blocks=3", "trainer.global_batch_size=8")
    assert row_bytes(config, 1, 0) == 128 * 3 * 8 * (4 * 2 + 4)
    assert row_bytes(config, 1, 1) == 128 * 3 * 8 * (2 + 4)
    assert row_bytes(small("memory.num_blocks=3", "memory.window=1"), 1, 1) == 32 * 3 * 8 * (2 + 4)
    assert row_bytes(small(), 1, 0) == 0


@pytest.mark.parametrize(
    ("tokens", "measured"),
    [(2_048, 865), (8_192, 2_313), (32_768, 6_837), (65_536, 10_216), (131_072, 15_363)],
)
def test_no_text_measured_had_more_types_than_assumed_nor_less_than_a_third(tokens, measured):
    assert measured <= distinct_types(tokens, 128_256) <= 3 * measured
    assert distinct_types(tokens, 500) == 500


def test_the_total_is_the_state_and_the_fullest_instant():
    found = device_memory.DeviceMemory(*range(1, 7), *(10, 20, 30, 400))
    assert (found.state, found.backward) == (1 + 2 + 3 + 4, 5 + 6 + 10 + 20)
    assert found.total == found.state + 400
    assert device_memory.DeviceMemory(*range(1, 7), 10, 20, 50, 2).total == found.state + 50
    assert device_memory.DeviceMemory(*range(1, 7), 10, 20, 3, 2).total == found.state + 41


def test_the_state_has_no_activations():
    config = small("memory.num_blocks=3")
    assert state_bytes(config, 1) == 16 * stage_parameters(config, 0).total


def test_3b_at_microbatch_8_does_not_fit_one_node_of_h100_and_its_own_does():
    words = ["experiment=tide_8e_3b", "cluster=h100"]
    with pytest.raises(ConfigError, match=r"46\.5 for activations: trainer\.micro_batch_size=4 would fit"):
        compose([*words, "trainer.micro_batch_size=8"], world_size=8)
    config = compose(words, world_size=8)
    assert config.trainer.global_batch_size == compose(["experiment=tide_8e_1b"]).trainer.global_batch_size
    found = device_memory.device_memory(config, 8)
    # 3.2 B weights, an eighth of their optimizer and of 3.15 B in tables; the fp32 sum and the embedding.
    assert found.weights / 1e9 == pytest.approx(2 * 3.2134, rel=1e-3)
    assert found.optimizer / 1e9 == pytest.approx(12 * 3.2134 / 8, rel=1e-3)
    assert found.owned_rows / 1e9 == pytest.approx(16 * 8 * 128_256 * 3072 / 8 / 1e9, rel=1e-3)
    assert found.gradients / 1e9 == pytest.approx(4 * 3.2134 + 2 * 0.394, rel=1e-3)
    assert found.loss / 1e9 == pytest.approx(1.576 + 4 * 8192 * 3072 / 1e9 + 1.074, rel=1e-3)


SCRIPTS = sorted((ROOT / "slurm").glob("*_*b.sh")) + sorted((ROOT / "slurm").glob("*_*m.sh"))


def test_there_is_a_job_script_for_every_paper_experiment():
    named = {re.search(r"^EXPERIMENT=(\w+)$", script.read_text(), flags=re.M)[1] for script in SCRIPTS}
    paper = {path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml") if "demo" not in path.stem}
    assert named == paper


@pytest.mark.parametrize("cluster", ["h100", "b200"])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_job_script_starts_and_fits_at_its_number_of_nodes(script, cluster):
    text = script.read_text()
    nodes, tasks = (int(re.search(rf"--{key}=(\d+)", text)[1]) for key in ("nodes", "ntasks-per-node"))
    experiment = re.search(r"^EXPERIMENT=(\w+)$", text, flags=re.M)[1]
    config = compose([f"experiment={experiment}", f"cluster={cluster}"], world_size=nodes * tasks)
    assert config.cluster.memory_gb is not None
