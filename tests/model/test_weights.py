"""Initial weights: the same for every topology and every K."""

import pytest
import torch

from tests.support.parity import (
    Case,
    canonical_parameters,
    configuration,
    parameter_names,
    reference_model,
)
from tide_mega.config.schema import MemoryConfig
from tide_mega.model.tide import TideModel
from tide_mega.model.weights import InitialWeights, initialise
from tide_mega.parallel.groups import make_groups


def initial_of(**memory):
    config = configuration(Case())
    return InitialWeights(config.model, MemoryConfig(**memory), seed=5)


def test_rows_do_not_depend_on_how_they_are_asked_for(monkeypatch):
    monkeypatch.setattr("tide_mega.model.weights.ROW_BLOCK", 7)
    initial = initial_of(num_blocks=2)
    whole = initial.rows("memory.tables.1", 0, 64)
    assert whole.shape == (64, 32)
    for first, last in ((0, 1), (6, 8), (7, 14), (13, 40), (63, 64)):
        assert torch.equal(initial.rows("memory.tables.1", first, last), whole[first:last])


def test_base_weights_do_not_depend_on_the_memory():
    with_memory, without = initial_of(num_blocks=8), initial_of(num_blocks=0)
    for name in ("embedding.weight", "layers.1.ffn.down.weight", "layers.0.attention.key.weight"):
        assert torch.equal(with_memory.rows(name, 0, 16), without.rows(name, 0, 16))


def test_every_tensor_has_its_own_values_and_spread():
    initial = initial_of(num_blocks=2, table_init_std=0.5, router_init_std=0.0, gain_init=0.25)
    assert not torch.equal(initial.rows("memory.tables.0", 0, 64), initial.rows("memory.tables.1", 0, 64))
    assert float(initial.rows("memory.tables.0", 0, 64).std()) == pytest.approx(0.5, rel=0.1)
    assert float(initial.rows("layers.0.ffn.gate.weight", 0, 48).std()) == pytest.approx(0.2, rel=0.1)
    down = initial.rows("layers.0.ffn.down.weight", 0, 32)
    assert down.shape == (32, 48)
    assert float(down.std()) == pytest.approx(0.2 / 6**0.5, rel=0.1)
    assert initial.rows("layers.2.router.weight", 0, 3).abs().max() == 0
    assert initial.rows("memory.gains.1", 0, 32).unique().tolist() == [0.25]
    assert initial.rows("layers.0.ffn_norm.weight", 0, 32).unique().tolist() == [1.0]


def build(case):
    config = configuration(case)
    model = TideModel(config, make_groups(config.parallel, seed=1), torch.device("cpu"))
    initialise(model, config.model, config.memory, config.trainer.seed)
    return model, config


def forget_one():
    model, config = build(Case())
    model.decoder.layers[0].extra = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(RuntimeError, match=r"no initial value is defined for decoder\.layers\.0\.extra"):
        initialise(model, config.model, config.memory, 1)


def test_a_parameter_without_initial_value_is_refused(pools):
    pools(1).run(forget_one)


def shards(case):
    model, _ = build(case)
    names = parameter_names(model)
    return {names[id(p)]: p.detach() for p in model.parameters()}


def test_tensor_parallel_shards_join_to_the_whole(pools):
    (whole,) = pools(1).run(shards, Case())
    first, second = pools(2).run(shards, Case(tensor=2))
    reference = canonical_parameters(reference_model(configuration(Case())))
    assert torch.equal(whole["embedding.word_embeddings.weight"], reference["embedding.weight"])
    for name, dimension in {
        "embedding.word_embeddings.weight": 0,
        "decoder.layers.1.self_attention.linear_qkv.weight": 0,
        "decoder.layers.1.self_attention.linear_proj.weight": 1,
        "decoder.layers.1.mlp.linear_fc2.weight": 1,
        "memory.tables_WKD": 0,
    }.items():
        assert torch.equal(torch.cat([first[name], second[name]], dimension), whole[name]), name
    for name in ("decoder.layers.0.router_JD", "memory.gains_KD", "decoder.final_layernorm.weight"):
        assert torch.equal(first[name], whole[name])
        assert torch.equal(second[name], whole[name])
