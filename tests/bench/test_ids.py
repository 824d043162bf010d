import pytest
import torch

from tide_mega.lab.bench.text import MEASURED_TYPES, draw_ids, expected_types


@pytest.mark.parametrize(("tokens", "types"), MEASURED_TYPES.items())
def test_zipf_ids_have_as_many_types_as_text(tokens, types):
    found = draw_ids("zipf", tokens, 128_256, seed=3).unique().numel()
    assert abs(found / types - 1) < 0.1


def test_each_distribution_stays_in_the_vocabulary():
    for name in ("zipf", "uniform", "one"):
        ids = draw_ids(name, 1000, 50, seed=0)
        assert ids.shape == (1000,) and ids.dtype == torch.int64
        assert int(ids.min()) >= 0 and int(ids.max()) < 50
    assert draw_ids("one", 9, 50, seed=0).unique().tolist() == [25]
    assert draw_ids("uniform", 5000, 50, seed=0).unique().numel() == 50


def test_ids_depend_on_the_seed_alone():
    first, again, other = (draw_ids("zipf", 100, 1000, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_an_unknown_distribution_is_named():
    with pytest.raises(ValueError, match="distribution is 'normal': must be one of zipf, uniform, one"):
        draw_ids("normal", 1, 10, seed=0)


def test_expected_types_meet_the_measured_ones_and_lie_between():
    assert {n: expected_types(n, 128_256) for n in MEASURED_TYPES} == MEASURED_TYPES
    # halfway on log-log axes between 2,048 and 8,192
    assert expected_types(4_096, 128_256) == round((620 * 1909) ** 0.5)
    assert expected_types(131_072, 128_256) > 8_810
    assert expected_types(16, 128_256) <= 16
    assert expected_types(10**9, 500) == 500
