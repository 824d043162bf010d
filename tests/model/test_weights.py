"""Initial weights: the same for every topology and every K."""

import pytest
import torch

from tide_mega.config.schema import MemoryConfig
from tide_mega.lab.parity.case import Case, configuration
from tide_mega.lab.parity.reference import canonical_parameters, reference_model
from tide_mega.lab.parity.run import build_stage, local_weights
from tide_mega.model.weights import InitialWeights, initialise


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
    assert float(down.std()) == pytest.approx(0.2 / 8**0.5, rel=0.1)
    assert initial.rows("layers.2.router.weight", 0, 3).abs().max() == 0
    assert initial.rows("memory.gains.1", 0, 32).unique().tolist() == [0.25]
    assert initial.rows("layers.0.ffn_norm.weight", 0, 32).unique().tolist() == [1.0]


def forget_one():
    config = configuration(Case())
    stage = build_stage(Case(), config)
    stage.chunks[0].decoder.layers[0].extra = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(
        RuntimeError, match=r"no initial value is defined for chunks\.0\.decoder\.layers\.0\.extra"
    ):
        initialise(stage, config.model, config.memory, 1)


def test_a_parameter_without_initial_value_is_refused(pools):
    pools(1).run(forget_one)


def shards(case):
    stage = build_stage(case, configuration(case))
    return {name: weight.detach() for name, weight in local_weights(stage).items()}


def test_tensor_parallel_shards_join_to_the_whole(pools):
    (whole,) = pools(1).run(shards, Case())
    first, second = pools(2).run(shards, Case(tensor=2))
    reference = canonical_parameters(reference_model(configuration(Case())))
    assert torch.equal(whole["embedding.word_embeddings.weight"], reference["embedding.weight"])
    for name, dimension in {
        "embedding.word_embeddings.weight": 0,
        "layers.1.self_attention.linear_qkv.weight": 0,
        "layers.1.self_attention.linear_proj.weight": 1,
        "layers.1.mlp.linear_fc2.weight": 1,
        "memory.tables": 0,
    }.items():
        assert torch.equal(torch.cat([first[name], second[name]], dimension), whole[name]), name
    for name in ("layers.0.router_JD", "memory.gains_KD", "decoder.final_layernorm.weight"):
        assert torch.equal(first[name], whole[name])
        assert torch.equal(second[name], whole[name])


def test_rows_of_the_tables_are_dealt_out_to_their_owners_in_turn(pools):
    case = Case(data=2, owners="tensor_data", vocab_size=61)
    first, second = pools(2).run(shards, case)
    reference = canonical_parameters(reference_model(configuration(case)))
    whole_VKD = torch.stack([reference[f"memory.tables.{k}"] for k in range(3)], dim=1)
    assert torch.equal(first["memory.tables"], whole_VKD[0::2])
    assert torch.equal(second["memory.tables"][:30], whole_VKD[1::2])
    assert second["memory.tables"][30:].shape == (1, 3, 32)
    assert second["memory.tables"][30:].abs().max() == 0


def test_a_pipeline_holds_every_layer_once(pools):
    stages = pools(2).run(shards, Case(pipeline=2, virtual_pipeline=2, accumulation=4))
    reference = canonical_parameters(reference_model(configuration(Case())))
    held = [{int(name.split(".")[1]) for name in stage if name.startswith("layers.")} for stage in stages]
    assert held == [{0, 2}, {1, 3}]
    for stage in stages:
        for name, weight in stage.items():
            if name.endswith("router_JD"):
                assert torch.equal(weight, reference[name.replace("router_JD", "router.weight")])
