"""A run that skips what it cannot read goes on from start to start, and counts what it left out."""

import json
import shutil
from pathlib import Path

import pytest

from tests.support.runs import tiny, train_here
from tide_mega.data.index import DatasetIndex
from tide_mega.data.prepare.options import PrepareOptions
from tide_mega.data.prepare.pipeline import prepare
from tide_mega.metrics.jsonl import read_metrics


@pytest.fixture(scope="module")
def prepared(tiny_data, tmp_path_factory):
    """The tiny dataset's text, in several shards of each split."""
    options = PrepareOptions(
        inputs=[str(tiny_data.parent / "text")],
        out=str(tmp_path_factory.mktemp("sharded") / "data"),
        tokenizer=str(tiny_data / "tokenizer.json"),
        validation_fraction=0.2,
        sample_tokens=4_096,
        shard_tokens=40_000,
        workers=1,
    )
    prepare(options, log=lambda _: None, progress=False)
    return Path(options.out)


@pytest.fixture
def sharded(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "data")


def every_second(folder, split="train"):
    """Shards that hold half of the text, so that a few batches are sure to meet them."""
    shards = DatasetIndex.load(folder).splits[split].shards[1::2]
    assert shards
    return [folder / shard.file for shard in shards]


def trained(root):
    records = read_metrics(root / "tiny" / "metrics.jsonl")
    return [(r["skipped_windows"], r["skipped_shards"]) for r in records if r["kind"] == "train"]


def refusal(config):
    from tide_mega.errors import DataError

    with pytest.raises(DataError) as info:
        train_here(config)
    return str(info.value)


def test_a_run_that_stopped_because_of_a_shard_goes_on_without_it_as_it_was_told(pools, sharded, tmp_path):
    assert pools(1).run(train_here, tiny(sharded, tmp_path, "trainer.max_steps=3")) == [3]
    shards = every_second(sharded)
    for shard in shards:
        shard.unlink()
    (message,) = pools(1).run(refusal, tiny(sharded, tmp_path))
    assert shards[0].name in message and "data.on_bad_shard=skip" in message
    assert pools(1).run(train_here, tiny(sharded, tmp_path, "data.on_bad_shard=skip")) == [6]
    assert trained(tmp_path)[-1][1] == len(shards)


def test_what_is_left_out_is_counted_across_starts_on_all_ranks(pools, sharded, tmp_path):
    def start(steps, processes):
        words = ("data.on_bad_shard=skip", f"trainer.max_steps={steps}", "logging.every=1")
        config = tiny(sharded, tmp_path, *words, world_size=processes)
        assert pools(processes).run(train_here, config) == [steps] * processes

    start(3, 2)
    assert trained(tmp_path) == [(0, 0)] * 3
    shards = every_second(sharded)
    for shard in shards:
        shard.rename(tmp_path / shard.name)
    for held_out in every_second(sharded, "validation"):
        held_out.unlink()
    start(6, 2)
    windows, skipped = zip(*trained(tmp_path), strict=True)
    assert skipped == (0, 0, 0, *[len(shards)] * 3)
    assert list(windows) == sorted(windows) and windows[-1] > 0
    state = json.loads((tmp_path / "tiny/checkpoints/step-00000006/state.json").read_text())
    kept = state["progress"]["extra"]["left_out"]
    assert kept.keys() == {shard.name for shard in shards}
    assert sum(kept.values()) == windows[-1]
    start(8, 1)
    assert trained(tmp_path)[-1][0] > windows[-1]
    for shard in shards:
        (tmp_path / shard.name).rename(shard)
    start(10, 1)
    assert trained(tmp_path)[-1] == trained(tmp_path)[-3]
    summary = json.loads((tmp_path / "tiny/summary.json").read_text())
    assert (summary["skipped_windows"], summary["skipped_shards"]) == trained(tmp_path)[-1]
