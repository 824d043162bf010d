"""Perplexity on texts during training: the reference model's, in every topology."""

import math
from pathlib import Path

import pytest
import torch

from tests.support.runs import tiny, train_here
from tests.support.trained import reference_of
from tide_mega.data.texts import TextSet
from tide_mega.errors import ConfigError, DataError
from tide_mega.lab.figures import perplexity
from tide_mega.lab.figures.analysis import Analysis
from tide_mega.lab.figures.registry import AnalyzeOptions
from tide_mega.metrics.deciles import SLOTS
from tide_mega.metrics.jsonl import read_metrics
from tide_mega.trained.run import TrainedRun
from tide_mega.training.evaluation import open_texts

TOKENS = 300
"""With T = 32 and B = 2: 10 windows, 5 microbatches, an odd number for two replicas or two stages."""
TOPOLOGIES = {
    "two replicas": (2, ()),
    "interleaved pipeline": (2, ("parallel.pipeline=2", "parallel.virtual_pipeline=2")),
    "two replicas, owners": (2, ("memory.owners=tensor_data",)),
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    source = Path(torch.serialization.__file__).read_text(encoding="utf-8")
    (folder / "python.txt").write_text(source[:20_000], encoding="utf-8")
    (folder / "short.txt").write_text("import math\nnaïve = 'über'\n", encoding="utf-8")
    return folder


def train(pools, tiny_data, root, texts, *overrides, world=1, steps=6):
    config = tiny(
        tiny_data,
        root,
        "model.num_layers=4",
        f"data.perplexity_texts=[{texts / 'python.txt'},{texts / 'short.txt'}]",
        f"data.perplexity_tokens={TOKENS}",
        f"trainer.max_steps={steps}",
        *overrides,
        world_size=world,
    )
    assert pools(world).run(train_here, config) == [steps] * world
    return [r for r in read_metrics(root / "tiny" / "metrics.jsonl") if r["kind"] == "eval"]


@pytest.fixture(scope="module")
def run_alone(pools, tiny_data, tmp_path_factory, texts):
    root = tmp_path_factory.mktemp("perplexity")
    return root / "tiny", train(pools, tiny_data, root, texts)


def test_it_is_measured_at_every_evaluation_and_counts_add_up(run_alone):
    _, records = run_alone
    assert [record["step"] for record in records] == [3, 6]
    for record in records:
        assert list(record["texts"]) == ["python", "short"]
        for name, result in record["texts"].items():
            counts = result["count_by_bin"]
            assert sum(counts.values()) == result["tokens"]
            assert result["tokens"] == TOKENS - 1 if name == "python" else result["tokens"] > 5
            total = sum((result["loss_by_bin"][slot] or 0) * counts[slot] for slot in SLOTS)
            assert total == pytest.approx(result["loss"] * result["tokens"], rel=1e-12)
            assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert records[1]["texts"]["python"]["loss"] < records[0]["texts"]["python"]["loss"]


@torch.no_grad()
def test_it_is_the_reference_models(run_alone, texts):
    folder, records = run_alone
    run = TrainedRun.open(folder)
    assert run.step == 6
    reference = reference_of(run)
    for name, result in records[-1]["texts"].items():
        text = TextSet.load(texts / f"{name}.txt", run.tokenizer, max_tokens=TOKENS)
        total, by_slot = 0.0, dict.fromkeys(SLOTS, 0.0)
        for first in range(0, text.num_scored, 32):
            window = torch.from_numpy(text.ids_N[first : first + 33])
            loss_T = reference(window[None, :-1], window[None, 1:]).cross_entropy_BT[0].double()
            total += loss_T.sum().item()
            for loss, label in zip(loss_T.tolist(), window[1:].tolist(), strict=True):
                bin_of_label = int(run.bins[label])
                by_slot[{-1: "dropped", -2: "unseen"}.get(bin_of_label, str(bin_of_label))] += loss
        assert result["tokens"] == text.num_scored
        assert result["loss"] == pytest.approx(total / text.num_scored, abs=1e-5)
        assert result["perplexity"] == pytest.approx(math.exp(total / text.num_scored), rel=1e-5)
        assert result["bits_per_byte"] == pytest.approx(total / math.log(2) / text.num_bytes, rel=1e-5)
        for slot, count in result["count_by_bin"].items():
            assert (result["loss_by_bin"][slot] or 0) * count == pytest.approx(by_slot[slot], abs=1e-3)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_a_topology_measures_what_one_process_does(pools, tiny_data, tmp_path, texts, run_alone, name):
    world, overrides = TOPOLOGIES[name]
    records = train(pools, tiny_data, tmp_path, texts, *overrides, world=world)
    for record, wanted in zip(records, run_alone[1], strict=True):
        for text, expected in wanted["texts"].items():
            found = record["texts"][text]
            assert found["count_by_bin"] == expected["count_by_bin"]
            assert found["tokens"] == expected["tokens"]
            for key in ("loss", "perplexity", "bits_per_byte", "rare", "mid", "common"):
                assert found[key] == (expected[key] and pytest.approx(expected[key], rel=1e-5))
            for slot, loss in expected["loss_by_bin"].items():
                assert found["loss_by_bin"][slot] == (loss and pytest.approx(loss, rel=1e-5))


def test_held_out_loss_is_as_without_texts(pools, tiny_data, tmp_path, texts, run_alone):
    config = tiny(tiny_data, tmp_path, "model.num_layers=4")
    pools(1).run(train_here, config)
    records = [r for r in read_metrics(tmp_path / "tiny" / "metrics.jsonl") if r["kind"] == "eval"]
    for record, with_texts in zip(records, run_alone[1], strict=True):
        assert record["texts"] == {}
        assert record == {**with_texts, "texts": {}}


def test_a_run_goes_on_with_other_texts(pools, tiny_data, tmp_path, texts):
    train(pools, tiny_data, tmp_path, texts, steps=3)
    other = f"data.perplexity_texts=[{texts / 'short.txt'}]"
    records = train(pools, tiny_data, tmp_path, texts, other, "data.perplexity_tokens=0")
    assert [list(record["texts"]) for record in records] == [["python", "short"], ["short"]]


def test_texts_that_cannot_be_measured_are_refused(tiny_data, tmp_path, texts):
    (tmp_path / "one").write_text("a", encoding="utf-8")
    (tmp_path / "python.md").write_text("other text", encoding="utf-8")

    def opened(*paths, **changes):
        words = [f"{key}={value}" for key, value in changes.items()]
        return open_texts(
            tiny(tiny_data, tmp_path, f"data.perplexity_texts=[{','.join(map(str, paths))}]", *words)
        )

    with pytest.raises(ConfigError, match=r"data\.perplexity_texts has .*nowhere\.txt, which is not a file"):
        opened(texts / "python.txt", tmp_path / "nowhere.txt")
    with pytest.raises(ConfigError, match=r"two files called python, .*python\.md the second"):
        opened(texts / "python.txt", tmp_path / "python.md")
    with pytest.raises(DataError, match=r"comes to 1 tokens, and one prediction needs two"):
        opened(tmp_path / "one")
    with pytest.raises(ConfigError, match=r"data\.perplexity_tokens=-1 is negative"):
        opened(texts / "python.txt", **{"data.perplexity_tokens": -1})
    with pytest.raises(DataError, match=r"python\.txt is longer than max_document_bytes=1000: "):
        opened(texts / "python.txt", **{"data.max_document_bytes": 1000})
    with pytest.raises(ConfigError, match=r"data\.max_document_bytes=0 "):
        opened(texts / "python.txt", **{"data.max_document_bytes": 0})
    assert opened() == []


def test_the_analysis_measures_what_training_logged(run_alone, texts, alone):
    folder, records = run_alone
    options = AnalyzeOptions(
        run=[str(folder)],
        texts=[str(texts / f"{name}.txt") for name in ("python", "short")],
        text_tokens=TOKENS,
        sequences=4,
    )
    section = perplexity.run(Analysis.open(options, alone))
    table = section.tables["perplexity"]
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    kept = {row["step"] for row in rows if row["text"] == "python"}
    assert kept == {3, 6}
    for record in records:
        for name, logged in record["texts"].items():
            (row,) = [r for r in rows if (r["text"], r["step"]) == (name, record["step"])]
            assert row["evaluated"] == "from the checkpoint"
            assert row["perplexity"] == pytest.approx(logged["perplexity"], rel=1e-5)
            assert row["bits per byte"] == pytest.approx(logged["bits_per_byte"], rel=1e-5)
    assert sum("at 2 checkpoints the loss logged in training" in note for note in section.notes) == 2
