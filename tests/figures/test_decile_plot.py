from pathlib import Path

import matplotlib.image
import pytest
from matplotlib.colors import to_rgba

from tide_mega.lab.figures.decile_comparison import DECILES, OUTSIDE, DecileRun, draw_deciles, plot_deciles
from tide_mega.lab.plotting import BASELINE, line, lines


def run(label: str, offset: float, *, memory: bool) -> DecileRun:
    by_slot: dict[str, float | None] = {slot: 8.0 - i / 2 - offset for i, slot in enumerate(DECILES)}
    null = {slot: i / 10 for i, slot in enumerate(DECILES)} if memory else {}
    outside: dict[str, float | None] = dict.fromkeys(OUTSIDE)
    return DecileRun(
        label=label,
        step=1,
        tokens=10,
        loss=5.0,
        rare=7.0,
        mid=6.0,
        common=4.0,
        loss_by_slot=by_slot | outside,
        count_by_slot=dict.fromkeys(DECILES + OUTSIDE, 5),
        null_by_layer=[0.5] if memory else [],
        null_mean_by_slot=dict(null),
        null_last_by_slot={slot: weight / 2 for slot, weight in null.items()},
    )


BASE = run("base", 0.0, memory=False)


def test_panels_show_losses_gains_and_null_weights() -> None:
    figure = draw_deciles(BASE, [run("tide", 0.25, memory=True)])
    losses, gains, null = figure.axes
    assert [line.get_label() for line in losses.lines] == ["base", "tide"]
    assert list(losses.lines[0].get_ydata()) == [8.0 - i / 2 for i in range(10)]
    assert [bar.get_height() for bar in gains.patches if bar.get_width() < 1][:10] == [0.25] * 10
    assert list(null.lines[0].get_ydata()) == [i / 10 for i in range(10)]
    assert list(null.lines[1].get_ydata()) == [i / 20 for i in range(10)]
    for axis in figure.axes:
        assert axis.get_xlabel().endswith("token")
        assert axis.get_title()
    assert "nats per token" in losses.get_ylabel()
    assert "nats per token" in gains.get_ylabel()


def test_without_memory_there_is_no_empty_panel() -> None:
    assert len(draw_deciles(BASE, [run("other", 0.1, memory=False)]).axes) == 2


def test_without_a_baseline_there_are_losses_alone() -> None:
    (losses,) = draw_deciles(None, [run("tide", 0.25, memory=True)], null_weights=False).axes
    assert [line.get_label() for line in losses.lines] == ["tide"]


def test_runs_look_different_up_to_36() -> None:
    looks = {(look.colour, look.marker) for look in map(line, range(36))}
    assert len(looks) == 36
    assert lines([0, 2, 4]) == [BASELINE, line(0), line(1)]
    assert lines([2, 4]) == [line(0), line(1)]
    assert lines([0, 0]) == [BASELINE, line(0)]


def test_a_decile_without_tokens_leaves_a_gap() -> None:
    other = run("tide", 0.25, memory=True)
    other.loss_by_slot["3"] = None
    losses, gains, _ = draw_deciles(BASE, [other]).axes
    assert list(losses.lines[1].get_xdata()) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert len([bar for bar in gains.patches if bar.get_width() == pytest.approx(0.8)]) == 9


def test_the_file_is_a_png_with_something_on_it(tmp_path: Path) -> None:
    path = tmp_path / "deciles.png"
    runs = [run(f"K={k}", k / 16, memory=True) for k in (2, 4, 8)]
    plot_deciles(BASE, runs, path)
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[1] > 3 * pixels.shape[0] > 1500
    assert 0.5 < pixels[..., :3].mean() < 0.999


def test_given_looks_are_those_of_the_runs_in_every_panel() -> None:
    looks = {"base": BASELINE, "gone": line(0), "tide": line(7), "more": line(2)}
    runs = [run("tide", 0.25, memory=True), run("more", 0.5, memory=True)]
    losses, gains, null = draw_deciles(BASE, runs, looks=looks).axes
    drawn = [(of.get_color(), of.get_marker()) for of in losses.lines]
    assert drawn == [(looks[name].colour, looks[name].marker) for name in ("base", "tide", "more")]
    bars = [container.patches[0].get_facecolor() for container in gains.containers]
    assert bars == [to_rgba(looks[name].colour) for name in ("tide", "more")]
    assert [of.get_color() for of in null.lines] == [line(7).colour] * 2 + [line(2).colour] * 2
