"""The table of tiles: which entry holds, what a wrong one says, and that it survives writing."""

import json

import pytest
import torch

from tide_mega.kernels import tuning
from tide_mega.kernels.tuning import ANY, KERNELS, Entry, Tile, arch_of, find, load, save, tile_of

SMALL, LARGE, OTHER = Tile(1, 16, 4, 1), Tile(2, 32, 4, 1), Tile(4, 64, 8, 2)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Write a table and let the lookups use it."""

    def write(*entries):
        path = tmp_path / "table.json"
        save(list(entries), path)
        monkeypatch.setattr(tuning, "load", lambda: load(path))
        find.cache_clear()
        return path

    yield write
    find.cache_clear()


def entry(arch, blocks, width, tile, kernel="mix_forward"):
    return Entry(kernel, arch, blocks, width, tile, "a test")


def test_the_tightest_entry_that_holds_is_used_and_beyond_all_the_widest(table):
    table(entry("sm_90", 4, 2048, SMALL), entry("sm_90", 24, 2048, LARGE), entry("sm_90", 24, 8192, OTHER))
    assert find("mix_forward", "sm_90", 4, 2048).tile == SMALL
    assert find("mix_forward", "sm_90", 5, 1024).tile == LARGE
    assert find("mix_forward", "sm_90", 2, 4096).tile == OTHER
    assert find("mix_forward", "sm_90", 99, 2048).tile == OTHER
    assert find("mix_forward", "sm_90", 99, 99_999).tile == OTHER


def test_an_architecture_without_entries_uses_those_of_any(table):
    table(entry("sm_90", 24, 2048, SMALL), entry(ANY, 24, 2048, LARGE))
    assert find("mix_forward", "sm_120", 8, 2048).tile == LARGE
    assert tile_of("mix_forward", torch.device("cpu"), 8, 2048) == LARGE


def test_a_kernel_without_entries_is_named(table):
    table(entry("sm_90", 24, 2048, SMALL))
    with pytest.raises(KeyError, match="no entry of kernel 'mix_backward' for sm_90 or any"):
        find("mix_backward", "sm_90", 8, 2048)


def test_a_table_survives_writing_one_entry_a_line(table):
    entries = [entry("sm_90", 24, 2048, SMALL), entry(ANY, 8, 1024, OTHER, "norm_forward")]
    path = table(*entries)
    assert set(load(path)) == set(entries)
    assert sum('"kernel"' in line for line in path.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [({"kernel": "mix"}, "entry 1 is of 'mix'"), ({"items": 3}, "items, width and warps are powers of two")],
)
def test_a_wrong_entry_is_named(tmp_path, change, message):
    path = tmp_path / "table.json"
    save([entry("sm_90", 24, 2048, SMALL)], path)
    content = json.loads(path.read_text())
    content["entries"][0].update(change)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load(path)


def test_the_checked_in_table_serves_every_kernel_k_and_width_and_says_how_it_was_chosen():
    assert {e.arch for e in load()} >= {ANY, "sm_90", "sm_100"}
    for kernel in KERNELS:
        for blocks in (1, 2, 24, 40):
            for width in (64, 2048, 16_384):
                assert find(kernel, "sm_90", blocks, width).kernel == kernel
    assert all(
        e.chosen_by == "compile report, not timed" or e.chosen_by.startswith("timed: ") for e in load()
    )


def test_a_cpu_has_no_architecture_of_its_own():
    assert arch_of(torch.device("cpu")) == ANY
