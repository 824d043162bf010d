"""Results on texts: what they come to by hand, and how they are logged."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from tide_mega.data.frequency import DROPPED, UNSEEN
from tide_mega.metrics.deciles import DecileLoss, DecileResult, NullWeightResult
from tide_mega.metrics.jsonl import JsonlLogger, read_metrics
from tide_mega.metrics.names import eval_metrics
from tide_mega.metrics.records import EvalRecord, TextResult, perplexity_of


def two_bits_each(num_bytes: int) -> TextResult:
    """Four tokens of 2 bits: one rare, two common, one dropped; and padding."""
    deciles = DecileLoss(torch.tensor([0, 9, DROPPED, UNSEEN]))
    labels_BT = torch.tensor([[0, 1, 1], [2, -1, -1]])
    deciles.update(torch.full((2, 3), 2 * math.log(2)), labels_BT)
    return TextResult.of(deciles.reduce(lambda tensor: tensor), num_bytes)


def record(texts: dict[str, TextResult] | None) -> EvalRecord:
    empty = DecileResult(None, 0, {}, {}, None, None, None)
    return EvalRecord.of(5, 100, empty, NullWeightResult([], [], {}, {}), texts)


def test_bits_are_shared_by_bytes() -> None:
    result = two_bits_each(num_bytes=16)
    assert result.tokens == 4
    assert result.perplexity == pytest.approx(4)
    assert result.bits_per_byte == pytest.approx(8 / 16)
    assert result.count_by_bin["dropped"] == result.count_by_bin["0"] == 1
    assert result.count_by_bin["9"] == 2
    assert result.rare == pytest.approx(2 * math.log(2))
    assert result.mid is None
    assert two_bits_each(num_bytes=0).bits_per_byte is None


def test_a_perplexity_beyond_floats_is_infinite() -> None:
    assert perplexity_of(0.0) == 1
    assert perplexity_of(1e4) == math.inf
    assert math.isnan(perplexity_of(math.nan))


def test_records_have_texts_on_disk_and_lines_without_them_are_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    old = {key: value for key, value in asdict(record(None)).items() if key != "texts"}
    path.write_text(json.dumps({"kind": "eval", **old}) + "\n", encoding="utf-8")
    logger = JsonlLogger(path, resume_step=5)
    logger.log(record({"wiki": two_bits_each(16)}))
    logger.close()
    first, second = read_metrics(path)
    assert "texts" not in first
    assert TextResult(**second["texts"]["wiki"]) == two_bits_each(16)


def test_names_of_texts() -> None:
    named = eval_metrics(record({"wiki": two_bits_each(16), "pubmed": two_bits_each(0)}))
    assert named["perplexity/wiki"] == pytest.approx(4)
    assert named["bits_per_byte/wiki"] == pytest.approx(0.5)
    assert "bits_per_byte/pubmed" not in named
    of_deciles = {name for name in named if name.startswith("loss_by_decile_wiki/")}
    assert of_deciles == {f"loss_by_decile_wiki/{slot}" for slot in ("0", "9", "dropped")}
