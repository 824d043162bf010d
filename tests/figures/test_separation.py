"""Distances between hidden states of token pairs: known arrays, planted collapses, the plain reference."""

import numpy as np
import pytest
import torch

from tests.support.trained import reference_of
from tests.support.word_tokenizer import WordTokenizer
from tide_mega.data.frequency import UNSEEN
from tide_mega.lab.figures import separation as report
from tide_mega.lab.figures.analysis import Analysis, SkippedError
from tide_mega.lab.figures.registry import AnalyzeOptions
from tide_mega.lab.figures.separation import (
    Separation,
    draw_heat,
    draw_lines,
    measure_separation,
    run,
    slot_states,
)
from tide_mega.lab.figures.separation_pairs import CATEGORIES, SAMPLED, Category, Template, choose_pairs
from tide_mega.lab.plotting import lines
from tide_mega.trained.model import TrainedModel
from tide_mega.trained.run import TrainedRun

TEMPLATES = (Template("They said", " twice."), Template("Nobody there wrote", "."))


def chosen_of(tokenizer, *pairs, limit=12):
    return choose_pairs(Category("test", pairs, TEMPLATES), tokenizer, limit)


def test_distances_of_hand_made_states():
    # One layer, three words, two dimensions: a 3-4-5 triangle, and the same twice as large.
    triangle_LWD = torch.tensor([[[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]]])
    measured = measure_separation([triangle_LWD, 2 * triangle_LWD], [(0, 1), (1, 2), (0, 2), (1, 1)])
    assert measured.distance_PL.tolist() == [[4.5], [6.0], [7.5], [0.0]]
    assert measured.norm_L.tolist() == pytest.approx([1.5 * (0 + 3 + 5) / 3])
    assert measured.mean_L.tolist() == [4.5]
    assert measured.relative_L.tolist() == pytest.approx([4.5 / 4.0])
    assert measured.templates == 2


def test_nothing_to_average_is_an_error():
    with pytest.raises(ValueError, match="1 pairs in 0 templates"):
        measure_separation([], [(0, 1)])


@pytest.mark.parametrize("sequences", [1, 40])
def test_states_are_those_of_each_word_after_its_context(sequences):
    tokenizer = WordTokenizer("a", "b", "c", "They", "said", "Nobody", "there", "wrote")
    chosen = chosen_of(tokenizer, ("a", "b"), ("b", "c"))

    def look(tokens_RS):  # a layer that adds up ids, and one that shows the first of them
        assert tokens_RS.numel() <= sequences * 128
        return torch.stack([tokens_RS.cumsum(1), tokens_RS[:, :1].expand_as(tokens_RS)]).unsqueeze(-1)

    states = list(slot_states(look, chosen, templates=2, start_id=7, sequences=sequences))
    assert len(states) == 2
    by_total = {int(state[0, 0, 0]): state for state in states}
    for context in chosen.contexts:
        state = by_total[7 + int(context.sum()) + int(chosen.ids_W[0])]
        assert state[0, :, 0].tolist() == [7 + context.sum() + index for index in chosen.ids_W]
        assert state[1, :, 0].tolist() == [7, 7, 7]


def test_sentences_are_cut_at_the_slot_without_loss(tiny_runs, alone):
    run_2 = TrainedRun.open(tiny_runs[2])
    category = CATEGORIES[1]
    chosen = choose_pairs(category, run_2.tokenizer)
    model, reference = TrainedModel(run_2, alone), reference_of(run_2)
    got = slot_states(lambda tokens: model.look_inside(tokens).hidden_LBTD, chosen, 3, 0, 1)
    measured = measure_separation(got, chosen.columns)

    hidden = []
    for layer in reference.layers:
        layer.register_forward_hook(lambda _, __, output: hidden.append(output[0]))
    first, second = chosen.measured[0].pair
    distances = []
    for template in category.templates[:3]:
        ids = [run_2.tokenizer.encode_batch([template.sentence(word)])[0] for word in (first, second)]
        at = int(np.flatnonzero(ids[0] != ids[1])[0]) + 1
        hidden.clear()
        with torch.no_grad():
            reference.logits(torch.from_numpy(np.stack([np.r_[0, of_word] for of_word in ids])))
        distances.append([float((h_BTD[0, at] - h_BTD[1, at]).norm()) for h_BTD in hidden])
    np.testing.assert_allclose(measured.distance_PL[0], np.mean(distances, 0), rtol=1e-4)


def planted(model, chosen, *, memory_apart):
    """Give the first pair equal rows; with `memory_apart` the second token another row in every table."""
    first, second = chosen.measured[0].ids
    with torch.no_grad():
        embedding_VD = model.stage.transformers[0].embedding.word_embeddings.weight
        embedding_VD[second] = embedding_VD[first]
        if model.stage.memory.blocks is not None:
            tables_VKD = model.stage.memory.blocks.tables_WKD
            tables_VKD[second] = tables_VKD[first]
            if memory_apart:
                tables_VKD[second] = torch.randn(
                    tables_VKD.shape[1:], generator=torch.Generator().manual_seed(1)
                )


@pytest.mark.parametrize(("k", "memory_apart"), [(0, False), (2, False), (2, True)])
def test_equal_rows_collapse_in_every_layer_unless_the_memory_differs(tiny_runs, alone, k, memory_apart):
    opened = TrainedRun.open(tiny_runs[k])
    model = TrainedModel(opened, alone)
    chosen = choose_pairs(CATEGORIES[1], opened.tokenizer)
    planted(model, chosen, memory_apart=memory_apart)
    states = slot_states(lambda tokens: model.look_inside(tokens).hidden_LBTD, chosen, 4, 0, 2)
    distance_PL = measure_separation(states, chosen.columns).distance_PL
    assert (distance_PL[1:] > 1e-3).all()
    if memory_apart:
        assert (distance_PL[0] > 0.1).all()
    else:
        np.testing.assert_allclose(distance_PL[0], 0, atol=1e-6)


def analysis_of(tiny_runs, device, *ks, **options):
    words = [f"k{k}={tiny_runs[k]}" for k in ks]
    return Analysis.open(AnalyzeOptions(run=words, batch=2, templates=3, **options), device)


def test_the_section_of_a_baseline_and_a_run_with_memory(tiny_runs, alone, monkeypatch):
    # The tiny vocabulary has no words to sample.
    letters = Category(SAMPLED, (("a", "b"),), TEMPLATES)
    monkeypatch.setattr(report, "sampled_rare_pairs", lambda *_: letters)
    section = run(analysis_of(tiny_runs, alone, 0, 2))
    means = {row[:3]: row[3:] for row in section.tables["mean_distances"].rows}
    pairs = [row for row in section.tables["pairs"].rows if row[3] == "measured"]
    categories = {category for category, *_ in pairs}
    assert {"numerals", SAMPLED} <= categories
    for category in categories:
        for label in ("k0", "k2"):
            for layer in range(2):
                values = [
                    row[4]
                    for row in section.tables["distances"].rows
                    if (row[0], *row[2:4]) == (category, label, layer)
                ]
                mean, norm, relative = means[category, label, layer]
                assert mean == pytest.approx(np.mean(values)) and relative == pytest.approx(mean / norm)
                assert len(values) == sum(row[0] == category for row in pairs)
    assert set(section.figures) == {"by_layer", "by_layer_relative", "pairs_1"}
    assert len(section.tables["templates"].rows) == 3 * (len(categories) - 1) + len(TEMPLATES)
    assert any(text.startswith("rare domain synonyms: nothing is measured") for text in section.findings)
    assert any("They are no synonyms" in note for note in section.notes)


def test_a_baseline_alone_is_shown_without_a_comparison(tiny_runs, alone):
    section = run(analysis_of(tiny_runs, alone, 0))
    assert set(section.figures) == {"by_layer", "by_layer_relative", "pairs_1"}
    assert not any("farther apart" in finding for finding in section.findings)

    note = next(text for text in section.notes if text.startswith("rare domain synonyms: "))
    assert "dropped, as their sentences do not differ in one token alone, the word itself (reasons in" in note


def test_without_any_pair_it_is_skipped(tiny_runs, alone, monkeypatch):
    nothing = Category("nothing", (("unheardof", "unthoughtof"),), TEMPLATES)
    monkeypatch.setattr(report, "CATEGORIES", (nothing,))
    analysis = analysis_of(tiny_runs, alone, 0)
    analysis.runs[0].__dict__["bins"] = np.full(640, UNSEEN, np.int8)
    with pytest.raises(SkippedError, match="pairs of single tokens"):
        run(analysis)


def test_figures_hold_every_run_pair_and_layer():
    generator = np.random.default_rng(0)
    runs = {
        f"k{k}": {
            name: Separation(generator.random((12, 28)), generator.random(28) + 1, 5)
            for name in ("one", "two")
        }
        for k in (0, 2, 24)
    }
    looks = dict(zip(runs, lines([0, 2, 24]), strict=True))
    figure = draw_lines(runs, looks, "k0", relative=False)
    top, below = figure.axes[0], figure.axes[2]
    np.testing.assert_allclose(top.get_lines()[1].get_ydata(), runs["k2"]["one"].mean_L)
    difference = below.get_lines()[1].get_ydata()
    np.testing.assert_allclose(difference, runs["k2"]["one"].mean_L - runs["k0"]["one"].mean_L)
    names = {name: [f"a{i}/b{i}" for i in range(12)] for name in ("one", "two")}
    heat = draw_heat({label: runs[label] for label in ("k0", "k24")}, names, "k0")
    images = [axis.images[0].get_array() for axis in heat.axes if axis.images]
    assert [image.shape for image in images] == [(12, 28)] * 6
    np.testing.assert_allclose(images[4], runs["k24"]["one"].distance_PL - runs["k0"]["one"].distance_PL)
    heat.savefig("/dev/null", format="png")
