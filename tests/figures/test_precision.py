"""Table 5 on a tiny training, and its findings and figure for known losses."""

import weakref

import pytest
import torch

from tide_mega.hf.rows_tide import RowFormat
from tide_mega.lab.figures import analysis as analyses
from tide_mega.lab.figures import precision, rank
from tide_mega.lab.figures.analysis import Analysis, SkippedError
from tide_mega.lab.figures.precision import (
    STORED,
    TRAINED,
    Precisions,
    describe,
    draw,
    measure,
    paper_rises,
    run,
)
from tide_mega.lab.figures.registry import AnalyzeOptions
from tide_mega.metrics.records import TextResult, perplexity_of


def analysis_of(tiny_runs, device, *ks, **options):
    words = [f"k{k}={tiny_runs[k]}" for k in ks]
    return Analysis.open(AnalyzeOptions(run=words, batch=2, sequences=4, **options), device)


def test_each_format_scores_as_a_model_whose_memory_holds_its_rows(tiny_runs, alone):
    analysis = analysis_of(tiny_runs, alone, 2)
    (opened,) = analysis.with_memory
    model, texts = analysis.model(opened), analysis.texts(opened)
    found = measure("k2", model, texts)
    assert list(found.by_format) == [TRAINED, *STORED]
    memory = model.stage.memory.blocks
    every_row = model.normalised(model.table_rows(torch.arange(640)))
    by_kind = {}
    for kind in STORED:
        form = RowFormat(kind, 2, 32)
        rows = form.decode(form.encode(every_row), torch.float32)
        memory.forward = lambda ids_U, _=None, rows=rows: rows[ids_U]
        total = sum(
            float(model.score([batch])[0].cross_entropy_BT.double().sum()) for batch in texts["held-out"]
        )
        by_kind[kind] = total / found.by_format[kind]["held-out"].tokens
        assert found.stored[kind] == 640 * form.record_bytes
    assert by_kind == pytest.approx(
        {kind: found.by_format[kind]["held-out"].loss for kind in STORED}, abs=1e-6
    )
    assert len({*by_kind.values(), found.by_format[TRAINED]["held-out"].loss}) == 5


def test_the_section_has_every_format_on_every_text(tiny_runs, alone, tmp_path):
    (tmp_path / "words.txt").write_text("import os\nprint(os.name)\n" * 20)
    options = {"texts": [str(tmp_path / "words.txt")], "text_tokens": 100}
    section = run(analysis_of(tiny_runs, alone, 0, 2, **options))
    rows = section.tables["by_precision"].rows
    kinds = (TRAINED, *STORED)
    assert [row[:4] for row in rows] == [
        ("k2", 2, text, kind) for text in ("held-out", "words") for kind in kinds
    ]
    assert all(row[7] == 0 for row in rows if row[3] == TRAINED)
    assert set(section.figures) == {"precision_1"} and len(section.findings) == 5
    assert not any("precision=" in note for note in section.notes)
    rounded = run(analysis_of(tiny_runs, alone, 2, precision="bf16"))
    assert any("precision=bf16: the trained tables are rounded" in note for note in rounded.notes)


@pytest.mark.parametrize("room", [precision, rank])
def test_one_model_at_a_time_is_in_memory(tiny_runs, alone, monkeypatch, room):
    there, before = weakref.WeakSet(), []

    def build(*args, **options):
        before.append(len(there))
        model = build_model(*args, **options)
        there.add(model)
        return model

    build_model = analyses.TrainedModel
    monkeypatch.setattr(analyses, "TrainedModel", build)
    monkeypatch.setattr("tide_mega.lab.figures.rank.PERCENTS", (50,))
    words = [f"late={tiny_runs[2]}", f"early={tiny_runs[2] / 'checkpoints' / 'step-00000003'}"]
    room.run(Analysis.open(AnalyzeOptions(run=words, batch=2, sequences=2), alone))
    assert before == [0, 0]


def test_without_memory_it_is_skipped(tiny_runs, alone):
    with pytest.raises(SkippedError, match="run with memory"):
        run(analysis_of(tiny_runs, alone, 0))


def known(loss, rare=None):
    return TextResult(loss, perplexity_of(loss), None, 9, rare, rare, rare, {}, {})


def precisions(rare=None):
    by_format = {
        kind: {"held-out": known(3 + rise, None if rare is None else rare + rise)}
        for kind, rise in zip((TRAINED, *STORED), (0, 0, 0.0001, 0.01, 0.02), strict=True)
    }
    return Precisions("k2", 2, dict(zip(by_format, (400, 200, 108, 56, 53), strict=True)), by_format)


def test_what_is_said_of_known_losses():
    by_text, sizes, int4, nf4 = describe(precisions(rare=5.0))
    assert by_text == (
        "k2, held-out: perplexity 20.086 in fp32; bf16 +0.00 %, int8 +0.01 %, int4 +1.01 %, nf4 +2.02 %."
    )
    assert "int4 0.0 MB (28 %)" in sizes
    assert "int4 changes the loss by rare +0.01000, mid +0.01000, common +0.01000 nats" in int4
    assert "nf4" in nf4
    assert len(describe(precisions())) == 2  # no token of any decile


def test_the_papers_rises():
    rises = paper_rises()
    assert rises["int4"] == pytest.approx({"WikiText-2": 1.73, "PubMed": 1.59, "DCLM": 1.46}, abs=0.01)
    assert all(value == 0 for value in rises["bf16"].values())


@pytest.mark.parametrize("rare", [None, 5.0])
def test_bars_are_the_rises_and_changes(rare):
    figure = draw(precisions(rare), paper_rises())
    (bars,) = figure.axes[0].containers
    assert [bar.get_height() for bar in bars] == pytest.approx([0, 0.01, 1.005, 2.02], abs=1e-3)
    assert len(figure.axes[1].containers) == (0 if rare is None else 3)
    figure.savefig("/dev/null", format="png")
