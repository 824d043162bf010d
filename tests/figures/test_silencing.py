"""Perplexity with silenced layers: known losses, and models in which silencing has a known effect."""

import math
import weakref

import numpy as np
import pytest
import torch

from tests.support.trained import reference_of
from tide_mega.data.loader import TokenBatch
from tide_mega.errors import DataError
from tide_mega.lab.figures import analysis as analysis_module
from tide_mega.lab.figures.analysis import Analysis, SkippedError
from tide_mega.lab.figures.registry import AnalyzeOptions
from tide_mega.lab.figures.silencing import Silencing, draw_silencing, mean_loss, measure_silencing, rise, run


def test_every_layer_is_silenced_alone_and_all_together():
    asked = []

    def loss(layers):
        asked.append(tuple(layers))
        return 2.0 + sum(layers)

    measured = measure_silencing(loss, 3)
    assert asked == [(), (0,), (1,), (2,), (0, 1, 2)]
    assert measured.loss == 2.0 and measured.all_silenced == 5.0
    assert measured.silenced_L.tolist() == [2.0, 3.0, 4.0]


def test_a_rise_is_the_relative_change_of_perplexity_in_per_cent():
    measured = Silencing(math.log(10), np.log([10.0, 15.0, 8.0]), math.log(100))
    np.testing.assert_allclose(measured.perplexity_L, [10, 15, 8])
    np.testing.assert_allclose(measured.rise_L, [0, 50, -20], atol=1e-12)
    assert rise(measured.loss, measured.all_silenced) == pytest.approx(900)
    assert rise(1.0, 2000.0) == math.inf


def analysis_of(tiny_runs, device, *ks, **options):
    words = [f"k{k}={tiny_runs[k]}" for k in ks]
    return Analysis.open(AnalyzeOptions(run=words, batch=2, sequences=4, **options), device)


@torch.no_grad()
def force_to_null(model, reference, *layers):
    """Give every state a huge first coordinate, which these layers' routers answer with the null bank."""
    stage = model.stage.transformers[0]
    for weight_VD in (stage.embedding.word_embeddings.weight, reference.embedding.weight):
        weight_VD[:, 0] = 50
    for index in layers:
        router_JD = stage.decoder.layers[index].router_JD
        for weight_JD in (router_JD, reference.layers[index].router.weight):
            weight_JD.zero_()
            weight_JD[-1, 0] = 100


def losses(model, batches, *layers):
    return mean_loss(model, batches, layers)


def reference_loss(reference, batches):
    with torch.no_grad():
        total = sum(
            reference(batch.tokens_BT, batch.labels_BT).cross_entropy_BT.double().sum() for batch in batches
        )
    return float(total / sum((batch.labels_BT >= 0).sum() for batch in batches))


def opened_of(tiny_runs, device):
    analysis = analysis_of(tiny_runs, device, 2)
    (opened,) = analysis.with_memory
    return analysis.model(opened), reference_of(opened), analysis.held_out(opened)


def test_silencing_a_layer_that_routes_to_null_changes_nothing(tiny_runs, alone):
    model, reference, batches = opened_of(tiny_runs, alone)
    force_to_null(model, reference, 1)
    whole = losses(model, batches)
    assert losses(model, batches, 1) == pytest.approx(whole, abs=1e-6)
    assert abs(losses(model, batches, 0) - whole) > 1e-5


def test_silencing_the_one_layer_whose_memory_counts_is_the_reference_with_empty_tables(tiny_runs, alone):
    model, reference, batches = opened_of(tiny_runs, alone)
    force_to_null(model, reference, 1)
    assert losses(model, batches) == pytest.approx(reference_loss(reference, batches), abs=1e-5)
    with torch.no_grad():
        reference.memory.tables_KVD.zero_()
    empty = reference_loss(reference, batches)
    assert losses(model, batches, 0) == pytest.approx(empty, abs=1e-5)
    assert abs(losses(model, batches) - empty) > 1e-4


def test_all_layers_silenced_are_the_reference_with_empty_tables(tiny_runs, alone):
    model, reference, batches = opened_of(tiny_runs, alone)
    with torch.no_grad():
        reference.memory.tables_KVD.zero_()
    assert losses(model, batches, 0, 1) == pytest.approx(reference_loss(reference, batches), abs=1e-5)


def test_padding_weighs_nothing(tiny_runs, alone):
    model, _, batches = opened_of(tiny_runs, alone)
    batch = batches[0]
    padded = TokenBatch(
        torch.cat([batch.tokens_BT, torch.zeros_like(batch.tokens_BT)]),
        torch.cat([batch.labels_BT, torch.full_like(batch.labels_BT, -1)]),
    )
    assert losses(model, [padded]) == pytest.approx(losses(model, [batch]), abs=1e-6)
    with pytest.raises(ValueError, match="no token has a label"):
        losses(model, [TokenBatch(batch.tokens_BT, torch.full_like(batch.labels_BT, -1))])


def test_the_section_has_every_layer_on_every_text(tiny_runs, alone, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        (folder / "words.txt").write_text(f"import os\nprint({folder.name!r})\n" * 20)
    texts = [str(folder / "words.txt") for folder in folders]
    section = run(analysis_of(tiny_runs, alone, 0, 2, texts=texts, text_tokens=100))
    rows = section.tables["by_layer"].rows
    names = ["held-out", "words", "words (2)"]
    assert [row[:3] for row in rows] == [("k2", name, layer) for name in names for layer in (0, 1)]
    whole = {row[1]: row for row in section.tables["whole_model"].rows}
    assert [whole[name][2] for name in names[1:]] == [99, 99]
    for _, name, _, loss, perplexity, percent in rows:
        assert perplexity == pytest.approx(math.exp(loss))
        assert percent == pytest.approx(100 * (perplexity / whole[name][3] - 1), abs=1e-6)
    assert len(section.findings) == 4 and set(section.figures) == {"layers_1"}
    with pytest.raises(DataError, match=r"words\.txt is longer than max_document_bytes=99: "):
        run(analysis_of(tiny_runs, alone, 0, 2, texts=texts, max_document_bytes=99))


def two_runs_with_memory(tiny_runs, device):
    early = tiny_runs[2] / "checkpoints" / "step-00000003"
    words = [f"late={tiny_runs[2]}", f"early={early}"]
    return Analysis.open(AnalyzeOptions(run=words, batch=2, sequences=4), device)


def test_one_model_at_a_time_is_in_memory(tiny_runs, alone, monkeypatch):
    models, before = [], []

    def build(*args, **options):
        before.append([model() for model in models])
        model = build_model(*args, **options)
        models.append(weakref.ref(model))
        return model

    build_model = analysis_module.TrainedModel
    monkeypatch.setattr(analysis_module, "TrainedModel", build)
    run(two_runs_with_memory(tiny_runs, alone))
    assert before == [[], [None]]


def test_tokens_are_those_of_each_run(tiny_runs, alone, monkeypatch):
    whole = Analysis.held_out
    parts = {"late": 2, "early": 1}
    monkeypatch.setattr(Analysis, "held_out", lambda self, of: whole(self, of)[: parts[of.label]])
    section = run(two_runs_with_memory(tiny_runs, alone))
    scored = {row[0]: row[2] for row in section.tables["whole_model"].rows}
    assert scored["late"] == 2 * scored["early"] > 0
    listed = ", ".join(f"{label} {number:,} of held-out" for label, number in scored.items())
    assert section.notes[0].startswith(f"Tokens scored: {listed.replace(', ', '; ')}. ")


def test_without_memory_it_is_skipped(tiny_runs, alone):
    with pytest.raises(SkippedError, match="run with memory"):
        run(analysis_of(tiny_runs, alone, 0))


@pytest.mark.parametrize(("first", "scale"), [(0.05, "linear"), (0.5, "symlog"), (9.0, "symlog")])
def test_the_axis_is_logarithmic_only_where_one_layer_towers(first, scale):
    silenced_L = np.full(28, 3.02)
    silenced_L[0] += first
    figure = draw_silencing("k24", {"text": Silencing(3.0, silenced_L, 20.0)})
    assert figure.axes[1].get_yscale() == scale
    line = figure.axes[1].get_lines()[0]
    np.testing.assert_allclose(line.get_ydata(), 100 * np.expm1(silenced_L - 3.0))
    assert len(figure.axes[1].get_xticks()) <= 14
    figure.savefig("/dev/null", format="png")


def test_a_perplexity_beyond_numbers_is_drawn_all_the_same():
    figure = draw_silencing("k2", {"text": Silencing(3.0, np.array([900.0, 3.1]), 900.0)})
    figure.savefig("/dev/null", format="png")
