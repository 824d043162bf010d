import pytest

from tide_mega.config.hydra_door import compose
from tide_mega.config.schema import MemoryConfig, ModelConfig
from tide_mega.config.sizes import count_parameters, flops_per_token, microbatches_per_step


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
    ("parallel", "world", "microbatches"),
    [("single", 1, 64), ("single", 64, 1), ("pp2", 64, 2), ("tp8_pp4", 64, 32), ("tp8_pp4", 32, 64)],
)
def test_microbatches_of_a_step_are_the_batch_over_replicas(parallel, world, microbatches):
    assert microbatches_per_step(compose([f"parallel={parallel}"]), world) == microbatches
