import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tide_mega.export.shards import INDEX_FILE, Entry, plan_shards, write_shards


def entry(name: str, values: torch.Tensor, dtype: torch.dtype, rows: int = 3) -> Entry:
    return Entry(name, dtype, tuple(values.shape), lambda: values.split(rows))


def some(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_the_library_reads_what_was_written_piece_by_piece(tmp_path):
    values = {"a": some(10, 3, 5), "b": some(7, 5), "c": some(9)}
    dtypes = {"a": torch.bfloat16, "b": torch.float32, "c": torch.bfloat16}
    records = torch.randint(0, 256, (11, 13), dtype=torch.uint8)
    entries = [entry(name, value, dtypes[name]) for name, value in values.items()]
    entries.insert(1, entry("records", records, torch.uint8))
    counted = []
    write_shards(tmp_path, plan_shards(entries), counted.append)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == {*values, "records"}
    assert torch.equal(found["records"], records)
    for name, value in values.items():
        assert torch.equal(found[name], value.to(dtypes[name]))
    assert sum(counted) == sum(e.size for e in entries)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_stay_below_a_size_unless_a_tensor_is_larger(tmp_path):
    sizes = {"a": 10, "b": 10, "large": 50, "c": 5, "d": 15}
    entries = [entry(name, some(rows, 4), torch.float32) for name, rows in sizes.items()]
    shards = plan_shards(entries, most=16 * 20)
    assert [[e.name for e in shard] for shard in shards] == [["a", "b"], ["large"], ["c", "d"]]
    write_shards(tmp_path, shards, lambda size: None)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == 16 * 90
    assert index["weight_map"]["c"] == "model-00003-of-00003.safetensors"
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], some(sizes[name], 4))


def test_pieces_that_are_not_the_tensor_are_an_error(tmp_path):
    short = Entry("short", torch.float32, (4, 2), lambda: [some(3, 2)])
    with pytest.raises(RuntimeError, match="short came to 24 bytes instead of 32"):
        write_shards(tmp_path, [[short]], lambda size: None)
    other = Entry("other", torch.float32, (4, 2), lambda: [some(4, 3)])
    with pytest.raises(RuntimeError, match=r"other came in pieces of shape \(4, 3\)"):
        write_shards(tmp_path, [[other]], lambda size: None)
