"""Router weights by layer and decile: hand-made weights, and routers with known choices."""

import numpy as np
import pytest
import torch

from tide_mega.data.frequency import DROPPED, UNSEEN
from tide_mega.lab.figures import routing as report
from tide_mega.lab.figures.analysis import Analysis, SkippedError
from tide_mega.lab.figures.registry import AnalyzeOptions
from tide_mega.lab.figures.routing import (
    Routing,
    RoutingSums,
    draw_layers,
    draw_null,
    draw_one_layer,
    measure_routing,
    run,
)
from tide_mega.lab.plotting import lines
from tide_mega.metrics.deciles import SLOTS

BINS = torch.tensor([0, 0, 9, DROPPED, UNSEEN], dtype=torch.int8)


def sums_of(alpha_LBTJ, tokens, labels=None):
    sums = RoutingSums(BINS)
    tokens_BT = torch.tensor([tokens])
    sums.update(alpha_LBTJ, tokens_BT, tokens_BT if labels is None else torch.tensor([labels]))
    return sums


def test_hand_made_weights_are_averaged_by_the_slot_of_the_input_token():
    alpha_LBTJ = torch.tensor([[[[0.2, 0.8], [0.4, 0.6], [1.0, 0.0], [0.3, 0.7], [0.5, 0.5]]]])
    routing = sums_of(alpha_LBTJ, [0, 1, 2, 3, 4]).result()
    assert dict(zip(SLOTS, routing.count_S.tolist(), strict=True)) == {
        **dict.fromkeys(SLOTS, 0),
        "0": 2,
        "9": 1,
        "dropped": 1,
        "unseen": 1,
    }
    null_S = dict(zip(SLOTS, routing.weight_LSJ[0, :, 1].tolist(), strict=True))
    assert null_S["0"] == pytest.approx(0.7) and null_S["9"] == 0.0
    assert null_S["dropped"] == pytest.approx(0.7) and null_S["unseen"] == pytest.approx(0.5)
    assert np.isnan(null_S["5"])
    np.testing.assert_allclose(routing.mean_LJ, [[2.4 / 5, 2.6 / 5]])


def test_batches_add_up_and_padding_counts_for_nothing():
    alpha = torch.rand(2, 1, 4, 3, generator=torch.Generator().manual_seed(0)).softmax(-1)
    whole = sums_of(alpha, [0, 1, 2, 3]).result()
    parts = sums_of(alpha[:, :, :2], [0, 1])
    tail_LBTJ = torch.cat([alpha[:, :, 2:], torch.ones(2, 1, 1, 3)], dim=2)
    parts.update(tail_LBTJ, torch.tensor([[2, 3, 0]]), torch.tensor([[1, 1, -1]]))
    np.testing.assert_allclose(parts.result().weight_LSJ, whole.weight_LSJ)
    assert parts.result().count_S.tolist() == whole.count_S.tolist()


def test_no_token_is_an_error():
    with pytest.raises(ValueError, match="no token was routed"):
        sums_of(torch.ones(1, 1, 1, 2), [0], [-1]).result()


def routing_with(mean_J):
    mean_LJ = np.array([mean_J])
    return Routing(np.repeat(mean_LJ[:, None], len(SLOTS), 1), mean_LJ, np.ones(len(SLOTS), np.int64))


@pytest.mark.parametrize(
    ("mean_J", "effective"),
    [
        ([0.2, 0.2, 0.2, 0.2, 0.2], 4.0),
        ([0.1, 0.1, 0.0, 0.0, 0.8], 2.0),
        ([0.6, 0.0, 0.0, 0.0, 0.4], 1.0),
    ],
)
def test_effective_blocks_of_known_shares(mean_J, effective):
    assert routing_with(mean_J).effective_L[0] == pytest.approx(effective)


def test_effective_blocks_are_unknown_where_the_null_bank_has_everything():
    assert np.isnan(routing_with([0.0, 0.0, 1.0]).effective_L[0])


def analysis_of(tiny_runs, device, *ks):
    words = [f"k{k}={tiny_runs[k]}" for k in ks]
    return Analysis.open(AnalyzeOptions(run=words, batch=2, sequences=6), device)


@torch.no_grad()
def plant(model, weight_of_coordinate):
    """Let the routers see one huge coordinate of the embedding, the same for all tokens but those listed.

    Args:
        model: its hidden states get coordinate 0, or another one for the token ids given.
        weight_of_coordinate: coordinate to the bank that it calls for, and token ids that have it.
    """
    stage = model.stage.transformers[0]
    embedding_VD = stage.embedding.word_embeddings.weight
    embedding_VD[:, 0] = 1000
    for coordinate, (_, ids) in weight_of_coordinate.items():
        if ids is not None:
            embedding_VD[ids, 0], embedding_VD[ids, coordinate] = 0, 1000
    for layer in stage.decoder.layers:
        layer.pre_mlp_layernorm.weight.fill_(1)
        layer.router_JD.zero_()
        for coordinate, (bank, _) in weight_of_coordinate.items():
            layer.router_JD[bank, coordinate] = 20


def test_a_router_forced_to_null_gives_it_everything_in_every_slot_and_layer(tiny_runs, alone):
    analysis = analysis_of(tiny_runs, alone, 2)
    (opened,) = analysis.with_memory
    plant(analysis.model(opened), {0: (-1, None)})
    routing = measure_routing(analysis, opened)
    seen = routing.count_S > 0
    assert seen.sum() > 8
    np.testing.assert_allclose(routing.weight_LSJ[:, seen, -1], 1, atol=1e-6)
    np.testing.assert_allclose(routing.mean_LJ[:, :-1], 0, atol=1e-6)


def test_a_router_without_weights_gives_every_bank_the_same(tiny_runs, alone):
    analysis = analysis_of(tiny_runs, alone, 2)
    (opened,) = analysis.with_memory
    plant(analysis.model(opened), {})
    routing = measure_routing(analysis, opened)
    np.testing.assert_allclose(routing.weight_LSJ[:, routing.count_S > 0], 1 / 3, atol=1e-6)
    np.testing.assert_allclose(routing.effective_L, 2, atol=1e-6)


def test_a_block_called_for_by_one_token_has_just_that_tokens_part_of_its_decile(tiny_runs, alone):
    analysis = analysis_of(tiny_runs, alone, 2)
    (opened,) = analysis.with_memory
    tokens = torch.cat([batch.tokens_BT[batch.labels_BT >= 0] for batch in analysis.held_out(opened)])
    in_last = tokens[torch.from_numpy(opened.bins)[tokens] == 9]
    planted, count = in_last.unique(return_counts=True)
    planted, count = int(planted[0]), int(count[0])
    plant(analysis.model(opened), {0: (-1, None), 1: (1, planted)})
    routing = measure_routing(analysis, opened)
    share = count / len(in_last)
    assert 0 < share < 1
    np.testing.assert_allclose(routing.weight_LSJ[:, 9, 1], share, atol=1e-5)
    np.testing.assert_allclose(routing.weight_LSJ[:, 9, 2], 1 - share, atol=1e-5)
    others = (routing.count_S > 0) & (np.arange(len(SLOTS)) != 9)
    np.testing.assert_allclose(routing.weight_LSJ[:, others, 2], 1, atol=1e-5)


def test_the_section_has_every_layer_slot_and_bank(tiny_runs, alone):
    section = run(analysis_of(tiny_runs, alone, 0, 2))
    rows = section.tables["by_slot"].rows
    assert len(rows) == 2 * len(SLOTS) * 3 and {row[0] for row in rows} == {"k2"}
    weights = {}
    for _, layer, slot, tokens, bank, weight in rows:
        assert (weight is None) == (tokens == 0)
        weights.setdefault((layer, slot), {})[bank] = weight
    assert all(set(of) == {"block 1", "block 2", "null"} for of in weights.values())
    assert all(sum(of.values()) == pytest.approx(1) for of in weights.values() if of["null"] is not None)
    assert set(section.figures) == {"null_by_decile", "last_layer_1", "layers_1"}
    assert any("in the last layer the null bank's mean weight goes from" in text for text in section.findings)


def planted(null_by_decile, tokens=1):
    """Two layers and blocks; the null bank's weights in both are given for the deciles that have tokens."""
    weight_LSJ = np.full((2, len(SLOTS), 3), np.nan)
    count_S = np.zeros(len(SLOTS), np.int64)
    for decile, null_L in null_by_decile.items():
        weight_LSJ[:, decile] = [[(1 - null) / 2, (1 - null) / 2, null] for null in null_L]
        count_S[decile] = tokens
    return Routing(weight_LSJ, np.nanmean(weight_LSJ, 1), count_S)


def section_of(tiny_runs, device, monkeypatch, **routings):
    monkeypatch.setattr(report, "measure_routing", lambda _, of: routings[of.label])
    words = [f"{label}={tiny_runs[2]}" for label in routings]
    return run(Analysis.open(AnalyzeOptions(run=words), device))


def test_deciles_without_a_token_are_not_compared(tiny_runs, alone, monkeypatch):
    inner = planted({3: (0.2, 0.3), 5: (0.1, 0.2), 7: (0.5, 0.4)})
    findings = section_of(tiny_runs, alone, monkeypatch, inner=inner).findings
    assert "goes from 0.300 on decile 3 to 0.400 on decile 7 and rises in 1 of 2 steps" in findings[0]
    assert findings[1].endswith("more on decile 7 than on decile 3 in 2 of 2 layers.")
    outer = planted({0: (0.2, 0.3), 9: (0.1, 0.4)})
    findings = section_of(tiny_runs, alone, monkeypatch, outer=outer).findings
    assert "0.300 on the rarest decile to 0.400 on the commonest decile and never falls" in findings[0]
    assert findings[1].endswith("more on the commonest decile than on the rarest decile in 1 of 2 layers.")


@pytest.mark.parametrize(
    ("null_by_decile", "order"),
    [
        ((0.3, 0.3, 0.4), "never falls"),
        ((0.3, 0.3, 0.3), "never falls"),
        ((0.3, 0.3, 0.2), "rises in 0 of 2 steps"),
    ],
)
def test_a_step_between_equal_neighbours_neither_rises_nor_falls(null_by_decile, order):
    routing = planted({decile: (0.2, null) for decile, null in enumerate(null_by_decile)})
    assert f" and {order} with frequency." in report._findings("run", routing)[0]


def test_one_decile_with_tokens_is_compared_with_nothing(tiny_runs, alone, monkeypatch):
    findings = section_of(tiny_runs, alone, monkeypatch, one=planted({4: (0.2, 0.3)})).findings
    assert not any("decile" in sentence for sentence in findings)
    assert findings[0].endswith("most in layer 1 (0.300).")


def test_token_counts_that_differ_are_given_for_each_run(tiny_runs, alone, monkeypatch):
    weights = {0: (0.2, 0.3), 9: (0.1, 0.4)}
    both = {"a": planted(weights, 600), "b": planted(weights, 50)}
    note = section_of(tiny_runs, alone, monkeypatch, **both).notes[0]
    assert note.startswith("a 1,200, b 100 held-out input tokens. ")
    same = {"a": planted(weights, 600), "b": planted(weights, 600)}
    assert section_of(tiny_runs, alone, monkeypatch, **same).notes[0].startswith("1,200 held-out")


def test_without_memory_it_is_skipped(tiny_runs, alone):
    with pytest.raises(SkippedError, match="run with memory"):
        run(analysis_of(tiny_runs, alone, 0))


@pytest.mark.slow
def test_figures_of_many_blocks_and_layers_show_all_of_them():
    weights_LSJ = np.random.default_rng(0).dirichlet(np.ones(25), (28, len(SLOTS)))
    one = draw_one_layer(weights_LSJ[-1], "k24", 27)
    np.testing.assert_array_equal(one.axes[0].images[0].get_array(), weights_LSJ[-1, :10, :-1].T)
    assert [bar.get_height() for bar in one.axes[1].patches[-10:]] == weights_LSJ[-1, :10, -1].tolist()
    layers = draw_layers(weights_LSJ[..., -1], weights_LSJ.mean(1), "k24")
    assert [axis.images[0].get_array().shape for axis in layers.axes[:2]] == [(28, 10), (28, 25)]
    null = draw_null({"k24": weights_LSJ[..., -1]}, {"k24": lines([24])[0]})
    np.testing.assert_array_equal(null.axes[0].get_lines()[0].get_ydata(), weights_LSJ[-1, :10, -1])
    for figure in (one, layers, null):
        figure.savefig("/dev/null", format="png")
