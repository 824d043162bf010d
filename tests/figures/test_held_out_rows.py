from pathlib import Path

import pytest
import torch

from tide_mega.data.loader import IGNORE_LABEL, TokenBatch
from tide_mega.errors import DataError
from tide_mega.lab.figures.analysis import Analysis, SkippedError
from tide_mega.lab.figures.registry import AnalyzeOptions
from tide_mega.parallel.device import choose_device


def test_rows_with_padding_are_left_out(tiny_runs: dict[int, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    analysis = Analysis.open(AnalyzeOptions(run=[str(tiny_runs[2])]), choose_device("cpu", 0))
    (run,) = analysis.runs
    tokens_BT = torch.arange(12).view(4, 3)
    labels_BT = tokens_BT + 1
    labels_BT[1] = IGNORE_LABEL
    labels_BT[2, 2] = IGNORE_LABEL
    batches = [TokenBatch(tokens_BT[:2], labels_BT[:2]), TokenBatch(tokens_BT[2:], labels_BT[2:])]
    monkeypatch.setattr(analysis, "held_out", lambda _: batches)
    assert [row.tolist() for row in analysis.held_out_rows(run, 9)] == [[0, 1, 2], [9, 10, 11]]
    assert [row.tolist() for row in analysis.held_out_rows(run, 1)] == [[0, 1, 2]]
    monkeypatch.setattr(analysis, "held_out", lambda _: [TokenBatch(tokens_BT[1:3], labels_BT[1:3])])
    with pytest.raises(SkippedError, match="held-out text of a whole sequence, 33 tokens"):
        analysis.held_out_rows(run, 9)


@pytest.mark.parametrize("how", ["skip", "fail"])
def test_bad_shards_are_dealt_with_as_the_training_did(
    tiny_runs: dict[int, Path], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    analysis = Analysis.open(AnalyzeOptions(run=[str(tiny_runs[2])], sequences=2), choose_device("cpu", 0))
    (run,) = analysis.runs
    run.config.data.on_bad_shard = how
    monkeypatch.setattr("tide_mega.data.stream.check_shard", lambda *_: "is cut")
    error = "holds 0 readable tokens" if how == "skip" else "is cut"
    with pytest.raises(DataError, match=error):
        analysis.held_out(run)


def test_a_batch_larger_than_the_text_adds_no_rows(tiny_runs: dict[int, Path]) -> None:
    options = AnalyzeOptions(run=[str(tiny_runs[2])], sequences=3, batch=8)
    analysis = Analysis.open(options, choose_device("cpu", 0))
    (run,) = analysis.runs
    (batch,) = analysis.held_out(run)
    assert len(batch.tokens_BT) == 8
    assert torch.equal(torch.stack(analysis.held_out_rows(run, 8)), batch.tokens_BT[:3])
