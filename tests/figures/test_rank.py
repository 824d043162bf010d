"""Figure 12 on tiny trainings, and on models whose tables a truncation is known to leave unchanged."""

import math

import pytest
import torch

from tide_mega.hf.rows_tide import RowFormat
from tide_mega.lab.figures import precision, rank, storage
from tide_mega.lab.figures import rank as cuts_module
from tide_mega.lab.figures.analysis import Analysis, SkippedError
from tide_mega.lab.figures.kit import as_stored, changed_rows, score_texts
from tide_mega.lab.figures.rank import (
    JOINT,
    PAPER_AT_90,
    PER_TABLE,
    Cut,
    RankCurves,
    cut_jointly,
    cut_tables,
    describe,
    draw,
    run,
)
from tide_mega.lab.figures.registry import AnalyzeOptions
from tide_mega.metrics.records import TextResult, perplexity_of
from tide_mega.trained.model import TrainedModel
from tide_mega.trained.run import StoredWeights


def analysis_of(tiny_runs, device, *ks, **options):
    words = [f"k{k}={tiny_runs[k]}" for k in ks]
    return Analysis.open(AnalyzeOptions(run=words, batch=2, sequences=4, **options), device)


class Weights:
    """A checkpoint with these tables alone."""

    def __init__(self, tables_VKD):
        self.tables_VKD = tables_VKD

    def shape(self, name):
        assert name == "memory.tables"
        return tuple(self.tables_VKD.shape)

    def chunks(self, name):
        yield from ((0, self.tables_VKD[:100]), (100, self.tables_VKD[100:]))


@torch.no_grad()
def with_tables(model, tables_VKD):
    model.stage.memory.blocks.tables_WKD.copy_(tables_VKD)
    return Weights(tables_VKD)


def low_rank(columns, rank, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(640, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)


def losses_of(scored):
    return {slot: loss for slot, loss in scored["held-out"].loss_by_bin.items() if loss is not None}


def most_apart(losses, others):
    return max(abs(losses[slot] - others[slot]) for slot in losses)


@pytest.fixture
def opened(tiny_runs, alone):
    analysis = analysis_of(tiny_runs, alone, 2)
    (run_with_memory,) = analysis.with_memory
    return analysis.model(run_with_memory), analysis.texts(run_with_memory)


def test_tables_of_rank_8_lose_nothing_at_rank_10_and_something_at_rank_4(opened, monkeypatch):
    model, texts = opened
    monkeypatch.setattr(cuts_module, "PERCENTS", (70, 90))
    weights = with_tables(model, torch.stack([low_rank(32, 8), low_rank(32, 8, seed=1)], dim=1))
    whole = losses_of(score_texts(model, texts))
    at_10, at_4 = cut_tables(model, weights, texts)
    assert (at_10.rank, at_4.rank) == (10, 4)
    assert (
        most_apart(losses_of(at_10.by_text), whole) < 2e-6 < 1e-4 < most_apart(losses_of(at_4.by_text), whole)
    )
    assert at_10.kept == pytest.approx(1) and at_4.kept < 0.9
    assert (at_10.stored, at_10.dense) == (2 * 2 * 10 * (640 + 32), 2 * 640 * 2 * 32)


def test_two_tables_that_are_one_are_cut_to_half_jointly_without_loss(opened, monkeypatch):
    model, texts = opened
    monkeypatch.setattr(cuts_module, "PERCENTS", (50, 60))
    table_VD = low_rank(32, 32)
    weights = with_tables(model, torch.stack([table_VD, table_VD], dim=1))
    whole = losses_of(score_texts(model, texts))
    at_32, at_26 = cut_jointly(model, weights, texts)
    assert (at_32.rank, at_26.rank) == (32, 26)
    # The coefficients are stored in bf16.
    assert most_apart(losses_of(at_32.by_text), whole) < 1e-3
    assert at_32.kept == pytest.approx(1) and at_26.kept < 0.999
    assert at_32.stored == 640 * 64 + 2 * 32 * 64


def test_rows_are_read_alike_whatever_the_chunk(opened):
    model, _ = opened
    ids_U = torch.tensor([3, 5, 8, 600])
    both = [changed_rows(model, model.normalised, chunk_elements=size)(ids_U) for size in (1, 130, 2**20)]
    assert torch.equal(both[0], both[2]) and torch.equal(both[1], both[2])
    assert torch.equal(both[0], model.normalised(model.table_rows(ids_U)))


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4", "nf4"])
def test_stored_rows_are_the_finished_ones_encoded_and_decoded(opened, kind):
    model, _ = opened
    form, ids_U = RowFormat(kind, 2, 32), torch.arange(0, 640, 7)
    finished = model.normalised(model.table_rows(ids_U))
    expected = form.decode(form.encode(finished), torch.float32)
    assert torch.equal(as_stored(model, form)(ids_U), expected)
    assert 0 < (expected - finished).abs().max() < {"bf16": 0.02, "int8": 0.05, "int4": 0.6, "nf4": 0.7}[kind]


def test_above_the_limit_the_joint_cut_is_left_out_in_a_sentence(tiny_runs, alone, monkeypatch):
    monkeypatch.setattr(cuts_module, "PERCENTS", (50,))
    monkeypatch.setattr("tide_mega.lab.figures.rank.MOST_JOINT_COLUMNS", 63)
    section = run(analysis_of(tiny_runs, alone, 0, 2))
    assert {row[2] for row in section.tables["by_rank"].rows} == {"none", PER_TABLE}
    assert any("have 64 columns and at most 63 are decomposed" in note for note in section.notes)


def test_the_section_has_every_cut_on_every_text(tiny_runs, alone, tmp_path):
    (tmp_path / "words.txt").write_text("import os\nprint(os.name)\n" * 20)
    analysis = analysis_of(tiny_runs, alone, 0, 2, texts=[str(tmp_path / "words.txt")], text_tokens=100)
    section = run(analysis)
    rows = section.tables["by_rank"].rows
    cuts = [("none", 0), *((method, p) for method in (PER_TABLE, JOINT) for p in range(10, 100, 10))]
    assert [row[:4] for row in rows] == [("k2", name, *cut) for name in ("held-out", "words") for cut in cuts]
    for row in rows:
        whole = next(other for other in rows if other[:3] == ("k2", row[1], "none"))
        assert row[9] == pytest.approx(math.exp(row[8]))
        assert row[10] == pytest.approx(100 * (row[9] / whole[9] - 1), abs=1e-6)
    for method in (PER_TABLE, JOINT):
        kept = [row[7] for row in rows if row[1:3] == ("held-out", method)]
        assert kept == sorted(kept, reverse=True) and 0 < kept[-1] < kept[0] < 100
    assert set(section.figures) == {"rank_1"} and len(section.findings) == 5


@pytest.mark.parametrize("room", [precision, rank, storage])
def test_rows_that_are_not_finite_leave_it_out(tiny_runs, alone, monkeypatch, room):
    chunks, table_rows = StoredWeights.chunks, TrainedModel.table_rows

    def spoilt(rows):
        rows[-1, 1, 3] = math.nan
        return rows

    monkeypatch.setattr(StoredWeights, "chunks", lambda *a: ((n, spoilt(rows)) for n, rows in chunks(*a)))
    monkeypatch.setattr(TrainedModel, "table_rows", lambda *a: spoilt(table_rows(*a)))
    with pytest.raises(
        SkippedError, match=r"it needs finite rows, and of k2 .* look at an earlier checkpoint"
    ):
        room.run(analysis_of(tiny_runs, alone, 2))


def test_without_memory_it_is_skipped(tiny_runs, alone):
    with pytest.raises(SkippedError, match="run with memory"):
        run(analysis_of(tiny_runs, alone, 0))


def result_of(loss):
    return TextResult(loss, perplexity_of(loss), None, 9, loss, loss, loss, {}, {})


def curves_of(*rises):
    """Losses `rises` above 3 at p = 10, 50 and 90 %, per table; jointly half of them."""
    made = [
        Cut(method, p, 10, 100 - p, 100, 0.5, {"held-out": result_of(3 + up / part)})
        for method, part in ((PER_TABLE, 1), (JOINT, 2))
        for p, up in zip((10, 50, 90), rises, strict=True)
    ]
    return RankCurves("k2", 640, 2, 32, {"held-out": result_of(3.0)}, made)


def test_what_is_said_of_the_cuts():
    rises, saves, per_table, jointly = describe(curves_of(0.001, 0.015, 2.0))
    assert "cut one by one +1.5 % at p = 50 %, +638.9 % at p = 90 %; cut jointly +0.8 % at p = 50 %" in rises
    assert "up to rank 30 of 32, those of all tables side by side up to 58 of 64" in saves
    assert "cut one by one need 90 % of their bytes in bf16 (p = 10 %)" in per_table
    assert "cut jointly need 50 % of their bytes in bf16 (p = 50 %)" in jointly
    assert "cut one by one save no bytes" in describe(curves_of(0.1, 0.2, 2.0))[2]


@pytest.mark.parametrize("rises", [(0.001, 0.01, 2.0), (-0.001, 0.0, 0.001), (0.1, 1.0, 900.0)])
def test_any_rise_can_be_drawn(rises):
    figure = draw(curves_of(*rises), PAPER_AT_90)
    line = figure.axes[1].get_lines()[0]
    assert list(line.get_xdata()) == [0, 10, 50, 90] and line.get_ydata()[0] == 0
    figure.savefig("/dev/null", format="png")
