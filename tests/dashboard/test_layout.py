import re

import pytest

from tests.dashboard.samples import EVENTS, all_names, all_rows
from tide_mega.lab.dashboard.layout import SECTIONS, uncovered
from tide_mega.lab.dashboard.panel import AXES, Panel, charts

PANELS = [panel for section in SECTIONS for panel in section.panels]


def test_sections_stand_in_order_with_loss_by_frequency_first() -> None:
    assert [section.title for section in SECTIONS] == [
        "Loss by frequency",
        "Loss",
        "Memory: routing",
        "Memory: tables",
        "Speed",
        "Faults and events",
    ]
    assert SECTIONS[0].panels[0].lines == tuple(f"loss_by_decile/{decile}" for decile in range(10))


def test_every_metric_that_is_logged_has_a_panel() -> None:
    assert uncovered(all_names()) == []


def test_a_metric_without_a_panel_is_found() -> None:
    assert uncovered([*all_names(), "loss_by_decile/10", "train/new"]) == ["loss_by_decile/10", "train/new"]


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.title)
def test_a_panel_shows_metrics_that_are_logged(panel: Panel) -> None:
    names = all_names()
    assert set(panel.lines) <= set(names)
    assert any(panel.shows(name) for name in names)


def test_no_metric_is_in_two_panels() -> None:
    shown = {name: [p.title for p in PANELS if p.shows(name)] for name in all_names() if name not in AXES}
    assert {name: titles for name, titles in shown.items() if len(titles) > 1} == {}


def test_titles_are_unique_and_patterns_anchored() -> None:
    titles = [panel.title for panel in PANELS]
    assert len(set(titles)) == len(titles)
    for panel in PANELS:
        assert not panel.pattern or re.fullmatch(r"\^[^^$]+\$", panel.pattern), panel.title


def test_every_record_has_both_axes() -> None:
    assert all(set(AXES) <= row.keys() for row in all_rows())
    assert {f"events/{event}" for event in EVENTS} <= set(all_names())


def test_lines_keep_the_order_of_layers_beyond_nine() -> None:
    panel = Panel("t", "u", pattern=r"^w/layer_(\d+)$", of="layer")
    (chart,) = charts(panel, ["w/layer_100", "w/layer_09", "w/layer_10", "v/layer_01"])
    assert chart.lines == {"w/layer_09": "09", "w/layer_10": "10", "w/layer_100": "100"}


def test_a_split_panel_becomes_one_for_each_text() -> None:
    panel = Panel("Loss", "u", pattern="^loss_by_decile_(.+)/[0-9]$", split=True)
    made = charts(panel, ["loss_by_decile_wiki/1", "loss_by_decile_a_b/0", "loss_by_decile_wiki/0"])
    assert [(chart.title, chart.lines) for chart in made] == [
        ("Loss: a_b", {"loss_by_decile_a_b/0": "0"}),
        ("Loss: wiki", {"loss_by_decile_wiki/0": "0", "loss_by_decile_wiki/1": "1"}),
    ]


def test_lines_with_the_same_end_keep_their_whole_name() -> None:
    (chart,) = charts(Panel("t", "u", ("train/loss", "eval/loss", "eval/other")), ["eval/loss", "train/loss"])
    assert chart.lines == {"train/loss": "train/loss", "eval/loss": "eval/loss"}


def test_a_panel_without_its_metrics_is_left_out() -> None:
    assert charts(Panel("t", "u", ("a",)), ["b"]) == []


def test_a_panel_needs_lines_or_a_pattern() -> None:
    with pytest.raises(ValueError, match="either lines or a pattern"):
        Panel("t", "u")
    with pytest.raises(ValueError, match="one group"):
        Panel("t", "u", pattern="^a$", split=True)
