import pytest

from tests.support.exports import UNTIED
from tests.support.runs import tiny
from tide_mega.export.names import canonical_name, llama_name
from tide_mega.lab.bench.random_run import canonical_shapes


def test_every_weight_has_a_name_of_its_own_and_leads_back(tmp_path):
    names = [n for n in canonical_shapes(tiny(tmp_path, tmp_path, *UNTIED)) if not n.startswith("memory.")]
    assert "output.weight" in names and "layers.1.router.weight" in names
    theirs = [llama_name(name) for name in names]
    assert len(set(theirs)) == len(names)
    assert [canonical_name(name) for name in theirs] == names


def test_a_weight_that_nobody_knows_is_an_error():
    with pytest.raises(KeyError):
        llama_name("layers.0.attention.bias")
