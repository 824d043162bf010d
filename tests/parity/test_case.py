import pytest

from tide_mega.errors import ConfigError
from tide_mega.lab.parity.case import FULL, GRIDS, QUICK, Case, check_case, configuration


def test_a_case_shows_what_differs_from_the_plain_one():
    assert str(Case()) == "plain"
    assert str(Case(data=2, num_blocks=0, window=None)) == "data=2 num_blocks=0"


def test_processes_are_the_product_of_the_sizes():
    assert Case(tensor=2, pipeline=2, data=3).world == 12


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        (Case(data=0), "data=0 is not positive"),
        (Case(data=9, tensor=2), r"tensor=2 x pipeline=1 x data=9 needs 18 processes: ask for at most 16\."),
        (
            Case(pipeline=2, virtual_pipeline=2, accumulation=3),
            r"accumulation=3 is not a multiple of pipeline=2, as the interleaved schedule needs: use 2 or 4\.",
        ),
        (Case(tensor=3), r"parallel\.tensor=3 does not divide model\.num_attention_heads=4"),
        (Case(pipeline=3), r"parallel\.pipeline=3 does not divide model\.num_layers=4"),
        (Case(zero_stage=3, pipeline=2), r"parallel\.zero_stage=3 does not run with parallel\.pipeline=2"),
        (
            Case(zero_stage=3, owners="tensor_data"),
            r"parallel\.zero_stage=3 does not run with memory\.owners",
        ),
        (Case(sequence_parallel=True), r"parallel\.sequence_parallel=true"),
        (Case(window=3), r"memory\.window=3"),
        (Case(tensor=2, vocab_size=61), r"model\.vocab_size=61"),
        (Case(exchange_ahead=True, window=1), r"memory\.exchange_ahead=true"),
        (Case(recompute="some"), r"parallel\.recompute=some is not a known choice"),
    ],
    ids=str,
)
def test_what_no_training_run_accepts_is_refused(case, sentence):
    with pytest.raises(ConfigError, match=sentence):
        check_case(case)


@pytest.mark.parametrize("name", GRIDS)
def test_a_grid_holds_distinct_cases_that_run(name):
    assert len(set(GRIDS[name])) == len(GRIDS[name])
    for case in GRIDS[name]:
        check_case(case)


def test_the_full_grid_has_every_axis():
    exact = [case for case in FULL if case.precision == "fp32"]
    assert len(exact) >= 24
    axes = {
        "world": {1, 2, 4, 8},
        "tensor": {1, 2},
        "pipeline": {1, 2, 4},
        "virtual_pipeline": {1, 2},
        "data": {1, 2, 4},
        "sequence_parallel": {False, True},
        "zero_stage": {1, 2, 3},
        "recompute": {"none", "selective", "full"},
        "owners": {"tensor", "tensor_data"},
        "accumulation": {1, 4},
        "num_blocks": {0, 3, 8},
        "tie_embeddings": {False, True},
        "exchange_ahead": {False, True},
        "window": {None, 1, 2},
    }
    for axis, values in axes.items():
        assert {getattr(case, axis) for case in exact} >= values, axis
    assert {case.world for case in FULL if case.precision == "bf16"} == {1, 2, 4, 8}


def test_the_quick_grid_needs_at_most_four_processes():
    assert max(case.world for case in QUICK) == 4


def test_a_step_has_the_microbatches_of_all_replicas():
    config = configuration(Case(data=4, accumulation=3))
    assert config.trainer.global_batch_size == 4 * 3 * config.trainer.micro_batch_size
