"""The tuner where there is no GPU, and how it changes the table."""

from dataclasses import replace

import pytest
import torch

from tests.support.tools import tool_module
from tide_mega.kernels.tuning import KERNELS, TABLE, Tile, load


@pytest.fixture(scope="module")
def tool():
    with tool_module("tune_kernels") as module:
        yield module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so_and_leaves_the_table(tool, capsys):
    before = TABLE.read_bytes()
    assert tool.main([]) == 3
    assert capsys.readouterr().err == "No CUDA device here: kernels can be timed on a GPU alone.\n"
    assert TABLE.read_bytes() == before


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("kernel=mix", "kernel=mix is unknown"),
        ("repeats=0", "repeats=0 is too small"),
        ("blocks=0", "has a K below 1"),
        ("table=/nowhere.json", "table=/nowhere.json does not exist"),
    ],
)
def test_a_wrong_option_is_refused_in_one_sentence(tool, capsys, word, sentence):
    assert tool.main([word]) == 2
    assert sentence in capsys.readouterr().err


def test_candidates_are_powers_of_two_and_exist_for_every_kernel(tool):
    assert set(tool.CANDIDATES) == set(KERNELS)
    for tiles in tool.CANDIDATES.values():
        assert len(tiles) == len(set(tiles)) > 1
        assert all(size & (size - 1) == 0 for t in tiles for size in (t.items, t.width, t.warps))


def test_a_timed_entry_takes_the_place_of_the_one_with_its_bounds_alone(tool):
    entries = load()
    timed = replace(entries[0], tile=Tile(2, 64, 2, 1), chosen_by="timed")
    added = replace(timed, most_blocks=3)
    changed = tool.replace(entries, [timed, added])
    assert len(changed) == len(entries) + 1
    assert {timed, added} <= set(changed) and set(entries[1:]) <= set(changed) and entries[0] not in changed
