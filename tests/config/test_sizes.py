import pytest

from tide_mega.config.hydra_door import compose
from tide_mega.config.schema import MemoryConfig, ModelConfig
from tide_mega.config.sizes import (
    bytes_per_device,
    count_parameters,
    flops_per_token,
    microbatches_per_step,
)

REPLICATED = "memory.owners=tensor"


def small_model(**changes):
    values = {
        "name": "small",
        "num_layers": 2,
        "hidden_size": 8,
        "ffn_hidden_size": 12,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "vocab_size": 10,
    }
    return ModelConfig(**(values | changes))


def test_every_kind_is_counted_as_by_hand():
    count = count_parameters(small_model(), MemoryConfig(num_blocks=3))
    assert count.embedding == 10 * 8
    assert count.output == 0
    assert count.attention == 2 * (8 * 8 + 8 * 4 + 8 * 4 + 8 * 8)
    assert count.mlp == 2 * 3 * 8 * 12
    assert count.norms == 5 * 8
    assert count.routers == 2 * 4 * 8
    assert count.tables == 3 * 10 * 8
    assert count.memory_gains == 3 * 8
    assert count.base == 80 + 384 + 576 + 40
    assert count.total == count.base + 64 + 240 + 24
    assert count.matmul == 384 + 576 + 64 + 80


def test_untied_output_adds_its_matrix_once():
    tied = count_parameters(small_model(), MemoryConfig())
    untied = count_parameters(small_model(tie_embeddings=False), MemoryConfig())
    assert untied.total - tied.total == 10 * 8
    assert untied.matmul == tied.matmul


def test_the_baseline_has_no_memory_parameters():
    count = count_parameters(small_model(), MemoryConfig(num_blocks=0))
    assert (count.routers, count.tables, count.memory_gains) == (0, 0, 0)
    assert count.total == count.base


def test_counts_match_a_model_built_from_torch_modules():
    from torch import nn

    model, blocks, d = small_model(), 3, 8
    layers = [
        nn.ModuleDict(
            {
                "q": nn.Linear(d, d, bias=False),
                "k": nn.Linear(d, 4, bias=False),
                "v": nn.Linear(d, 4, bias=False),
                "o": nn.Linear(d, d, bias=False),
                "gate": nn.Linear(d, 12, bias=False),
                "up": nn.Linear(d, 12, bias=False),
                "down": nn.Linear(12, d, bias=False),
                "norm1": nn.RMSNorm(d),
                "norm2": nn.RMSNorm(d),
                "router": nn.Linear(d, blocks + 1, bias=False),
            }
        )
        for _ in range(2)
    ]
    tables = [nn.ModuleList([nn.Embedding(10, d), nn.RMSNorm(d)]) for _ in range(blocks)]
    whole = nn.ModuleList([nn.Embedding(10, d), nn.RMSNorm(d), *layers, *tables])
    expected = sum(p.numel() for p in whole.parameters())
    assert count_parameters(model, MemoryConfig(num_blocks=blocks)).total == expected


def test_flops_are_six_a_product_parameter_and_attention_over_the_whole_sequence():
    assert flops_per_token(small_model(), MemoryConfig(), 16) == 6 * (384 + 576 + 80) + 12 * 2 * 8 * 16


def test_tables_cost_no_flops_but_routers_do():
    base = flops_per_token(small_model(), MemoryConfig(), 16)
    tide = flops_per_token(small_model(), MemoryConfig(num_blocks=3), 16)
    assert tide - base == 6 * 64


def test_one_block_of_the_1b_model_is_263_million_parameters():
    config = compose(["model=1b", "memory=k8"])
    assert count_parameters(config.model, config.memory).tables == 8 * 262_668_288


@pytest.mark.parametrize(
    ("stage", "precision", "world", "per_parameter"),
    [
        (1, "bf16", 1, 2 + 2 + 12),
        (1, "bf16", 4, 2 + 2 + 3),
        (2, "bf16", 4, 2 + 0.5 + 3),
        (1, "fp32", 2, 4 + 4 + 6),
        (2, "fp32", 2, 4 + 2 + 6),
        (3, "bf16", 4, 0.5 + 0.5 + 3),
        (3, "fp32", 2, 2 + 2 + 6),
        (3, "bf16", 1, 2 + 2 + 12),
    ],
)
def test_bytes_without_tensor_parallelism(stage, precision, world, per_parameter):
    config = compose(
        ["memory=k2", REPLICATED, f"parallel.zero_stage={stage}", f"trainer.precision={precision}"]
    )
    total = count_parameters(config.model, config.memory).total
    assert bytes_per_device(config, world) == pytest.approx(per_parameter * total, abs=16)


def test_tensor_parallelism_divides_all_but_norms_routers_and_gains():
    config = compose(["memory=k2", REPLICATED, "parallel=tp4"])
    count = count_parameters(config.model, config.memory)
    replicated = count.norms + count.routers + count.memory_gains
    parameters = (count.total - replicated) / 4 + replicated
    assert bytes_per_device(config, 4) == pytest.approx(16 * parameters, abs=64)


SMALL = (
    *("model.num_layers=4", "model.hidden_size=8", "model.ffn_hidden_size=12", "model.num_attention_heads=4"),
    *("model.num_query_groups=2", "model.vocab_size=1000", "trainer.precision=bf16"),
)
LAYER = (8 * 8 + 8 * 4 + 8 * 4 + 8 * 8) + 3 * 8 * 12
"""Elements of a layer's matrices; its two norms have 16 more, and the embedding 8,000."""


def small_bytes(world, *overrides):
    return bytes_per_device(compose([*SMALL, *overrides], validate=False), world)


def test_two_stages_split_the_layers_and_the_last_has_the_final_norm():
    # Tied: each stage has a copy of the embedding's matrix, and the last also the final norm.
    assert small_bytes(2, "parallel=pp2") == 16 * (2 * (LAYER + 16) + 8000 + 8)


def test_with_a_pipeline_the_output_layer_costs_the_same_tied_or_not():
    untied = small_bytes(2, "parallel=pp2", "model.tie_embeddings=false")
    assert untied == small_bytes(2, "parallel=pp2")
    assert small_bytes(1, "model.tie_embeddings=false") - small_bytes(1) == 16 * 8000


def test_tables_and_gains_are_on_the_first_stage_alone():
    # Routers are with their layers, (K + 1) d each.
    first = 2 * (LAYER + 16 + 4 * 8) + 8000 + 3 * 8000 + 3 * 8
    assert small_bytes(2, "parallel=pp2", "memory.num_blocks=3") == 16 * first


def test_more_stages_leave_the_first_fewer_layers_and_the_same_tables():
    two = small_bytes(2, "parallel.pipeline=2", "memory.num_blocks=3")
    four = small_bytes(4, "parallel.pipeline=4", "memory.num_blocks=3")
    assert two - four == 16 * (LAYER + 16 + 4 * 8)


def test_the_chunks_of_an_interleaved_stage_add_up_to_the_same():
    assert small_bytes(2, "parallel=pp2_interleaved") == small_bytes(2, "parallel=pp2")


def test_tables_owned_by_tensor_ranks_are_ordinary_parameters():
    # tensor 2 x data 2, ZeRO-1: 2 + 2 + 12 / 2 bytes.
    more = small_bytes(4, "parallel=tp2", "memory.num_blocks=3") - small_bytes(4, "parallel=tp2")
    assert more == 10 * (3 * 8000 // 2 + 4 * 4 * 8 + 3 * 8)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("stage", [1, 2])
def test_an_owner_has_sixteen_bytes_for_each_element_of_its_rows(stage, precision):
    words = ("parallel=tp2", f"parallel.zero_stage={stage}", f"trainer.precision={precision}")
    alone = small_bytes(8, *words, "memory.owners=tensor_data")
    more = small_bytes(8, *words, "memory.owners=tensor_data", "memory.num_blocks=3") - alone
    small = 3 * 8 + 4 * 4 * 8  # gains and routers
    element = 2 if precision == "bf16" else 4
    gradients = element / (4 if stage == 2 else 1)
    assert more == pytest.approx(16 * 3 * 8000 / 8 + small * (element + gradients + 3), abs=16)


def test_owners_are_those_of_the_first_stage():
    # 8 processes in 2 stages: 4 owners.
    words = ("parallel=tp2_pp2", "memory.owners=tensor_data", "memory.num_blocks=3")
    replicated = 2 * (16 + 4 * 8) + 3 * 8
    dense = (2 * LAYER + 8000) // 2 + replicated
    assert small_bytes(8, *words) == 10 * dense + 16 * 3 * 8000 // 4


def test_without_tables_it_does_not_matter_who_owns_them():
    assert small_bytes(4, "memory.owners=tensor_data") == small_bytes(4)


@pytest.mark.parametrize(
    ("parallel", "world", "microbatches"),
    [("single", 1, 64), ("single", 64, 1), ("pp2", 64, 2), ("tp8_pp4", 64, 32), ("tp8_pp4", 32, 64)],
)
def test_microbatches_of_a_step_are_the_batch_over_replicas(parallel, world, microbatches):
    assert microbatches_per_step(compose([f"parallel={parallel}"]), world) == microbatches
