"""Norms by decile and cosine distances of planted weights, whoever keeps them.

Shapes: V vocabulary, D width.
"""

import math

import pytest
import torch

from tide_mega.lab.parity.case import Case, configuration
from tide_mega.lab.parity.run import build_engine, build_stage
from tide_mega.metrics.deciles import SLOTS
from tide_mega.model.weights import InitialWeights, local_tensors
from tide_mega.training.live import SAMPLE, WeightDiagnostics, sample_types

CASES = [
    Case(),
    Case(zero_stage=2, data=2),
    Case(zero_stage=3),
    Case(data=2),
    Case(data=2, zero_stage=3),
    Case(tensor=2),
    Case(tensor=2, zero_stage=3, tie_embeddings=False),
    Case(data=2, owners="tensor_data", vocab_size=61),
    Case(tensor=2, owners="tensor_data"),
    Case(pipeline=2),
    Case(pipeline=2, owners="tensor_data"),
    Case(data=2, precision="bf16"),
    pytest.param(Case(tensor=2, data=2, zero_stage=3), marks=pytest.mark.slow),
    pytest.param(Case(tensor=2, data=2, owners="tensor_data", vocab_size=62), marks=pytest.mark.slow),
]


def bins(vocabulary):
    """Deciles in turn, with a dropped and an unseen type now and then."""
    bins_V = torch.arange(vocabulary) % 12
    return torch.where(bins_V == 11, -2, torch.where(bins_V == 10, -1, bins_V)).to(torch.int8)


def planted(vocabulary, width):
    """Embedding and three tables [V, D]: norms that grow with the decile, and cosines that are the same for all.

    Table 0 points as the embedding does, table 1 has a cosine of 0.6 with it, table 2 points the other way. Types
    outside the deciles are large and point anywhere.
    """
    bins_V = bins(vocabulary)
    length_V1 = (bins_V.double() + 1)[:, None]
    one, two = torch.eye(width).double()[:2]
    tables = [
        0.5 * length_V1 * one,
        length_V1 * one,
        2 * length_V1 * (0.6 * one + 0.8 * two),
        -3 * length_V1 * one,
    ]
    outside_V = bins_V < 0
    generator = torch.Generator().manual_seed(1)
    for table_VD in tables:
        table_VD[outside_V] = torch.randn(int(outside_V.sum()), width, generator=generator).double() + 50
    return [table_VD.float() for table_VD in tables]


def plant(engine, config, tensors):
    """Write them to the fp32 memory that optimizers update."""
    names = ["embedding.weight", *(f"memory.tables.{k}" for k in range(3))]
    named = dict(zip(names, tensors, strict=True))
    initial = InitialWeights(config.model, config.memory, 1)

    def fetch(name, first, last):
        return named[name][first:last] if name in named else initial.rows(name, first, last)

    for weight, values in local_tensors(engine.module, config.model, fetch):
        if engine.module.memory.owned is not None and weight is engine.module.memory.owned.master_WKD:
            weight.detach().copy_(values)
        elif (kept := engine.state.kept(weight)) is not None and len(values.flatten()) > 1:
            kept.master.copy_(values.flatten()[kept.start : kept.start + kept.master.numel()])


def measured(case, spoil=lambda tensors: None):
    config = configuration(case)
    engine = build_engine(case, config, build_stage(case, config))
    try:
        if case.num_blocks:
            tensors = planted(case.vocab_size, config.model.hidden_size)
            spoil(tensors)
            plant(engine, config, tensors)
        return WeightDiagnostics(engine, bins(case.vocab_size), seed=5).measure(7, 70)
    finally:
        engine.close()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_planted_norms_and_cosines_are_found(pools, case):
    records = pools(case.world).run(measured, case)
    first_stage = records[: case.world // case.pipeline]
    assert records[len(first_stage) :] == [None] * (len(records) - len(first_stage))
    assert all(record == first_stage[0] for record in first_stage)
    record = first_stage[0]
    assert (record.step, record.tokens) == (7, 70)
    bins_V = bins(case.vocab_size).tolist()
    codes = [*range(10), -1, -2]
    assert record.types_by_bin == {slot: bins_V.count(code) for slot, code in zip(SLOTS, codes, strict=True)}
    for decile in range(10):
        slot = str(decile)
        assert record.embedding_norm_by_bin[slot] == pytest.approx(0.5 * (decile + 1), rel=1e-6)
        by_block = [norms[slot] for norms in record.table_norm_by_block_and_bin]
        assert by_block == pytest.approx([(k + 1) * (decile + 1) for k in range(3)], rel=1e-6)
        assert record.table_norm_by_bin[slot] == pytest.approx(2 * (decile + 1), rel=1e-6)
    assert record.table_norm_by_bin["dropped"] > 100 < record.embedding_norm_by_bin["unseen"]
    assert record.sampled_types == sum(b >= 0 for b in bins_V) < SAMPLE
    assert record.cosine_distance_to_embedding == pytest.approx([0, 0.4, 2], abs=1e-6)
    between = [[0, 0.4, 2], [0.4, 0, 1.6], [2, 1.6, 0]]
    for found, expected in zip(record.cosine_distance_between, between, strict=True):
        assert found == pytest.approx(expected, abs=1e-6)


def spoil_a_row_of_embedding_and_of_the_second_table(tensors):
    tensors[0][0, 0] = math.nan  # type 0 is of decile 0, type 1 of decile 1
    tensors[2][1, 0] = math.inf


def test_a_norm_that_is_not_finite_stays_in_its_slot(pools):
    (record,) = pools(1).run(measured, Case(), spoil_a_row_of_embedding_and_of_the_second_table)
    assert math.isnan(record.embedding_norm_by_bin["0"])
    assert record.embedding_norm_by_bin["1"] == pytest.approx(1.0)
    norms = [record.table_norm_by_block_and_bin[k][slot] for k in range(3) for slot in ("0", "1", "2")]
    assert norms == pytest.approx([1, 2, 3, 2, math.inf, 6, 3, 6, 9])


def test_the_base_model_has_norms_of_its_embedding_alone(pools):
    (record,) = pools(1).run(measured, Case(num_blocks=0))
    assert 0.5 < record.embedding_norm_by_bin["0"] < 2  # init_std 0.2, 32 wide
    assert (record.table_norm_by_bin, record.table_norm_by_block_and_bin, record.sampled_types) == ({}, [], 0)
    assert (record.cosine_distance_to_embedding, record.cosine_distance_between) == ([], [])


def test_a_sample_has_each_decile_alike_and_nothing_else():
    bins_V = bins(12 * 300)
    sample = sample_types(bins_V, SAMPLE, seed=3)
    assert sample == sorted(set(sample)) == sample_types(bins_V, SAMPLE, seed=3)
    assert sample != sample_types(bins_V, SAMPLE, seed=4)
    counts = [int((bins_V[sample] == decile).sum()) for decile in range(10)]
    assert sum(counts) == len(sample) == SAMPLE
    assert set(counts) == {25, 26}


def test_a_decile_with_few_types_gives_what_it_has():
    bins_V = torch.full((500,), 4, dtype=torch.int8)
    bins_V[[3, 77]] = 0
    bins_V[100:] = -2
    sample = sample_types(bins_V, SAMPLE, seed=1)
    assert {3, 77} <= set(sample) and len(sample) == 2 + 26
    assert max(sample) < 100
