"""The decile comparison as a figure: losses, gains, and the null bank's weight."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tide_mega.diagnostics.deciles.run_losses import DECILES, DecileRun
from tide_mega.plotting.lines import BASELINE, Line, legend, line
from tide_mega.plotting.style import decile_axis, label, panels

_HEADROOM = 0.16
"""Part of the axis kept free above the data, for the names of the roles."""


def plot_deciles(baseline: DecileRun, runs: Sequence[DecileRun], path: Path) -> None:
    """Write the figure of `draw_deciles` as a PNG."""
    draw_deciles(baseline, runs).savefig(path, format="png")


def draw_deciles(
    baseline: DecileRun | None,
    runs: Sequence[DecileRun],
    *,
    null_weights: bool = True,
    looks: Mapping[str, Line] | None = None,
) -> Figure:
    """Losses per decile; gains over the baseline, if there is one; null weights, if runs have memory.

    `looks`, by label, are given where the runs are some of those that other figures show.
    """
    if looks is None:
        looks = {run.label: line(i) for i, run in enumerate(runs)}
        looks |= {} if baseline is None else {baseline.label: BASELINE}
    with_null = null_weights and any(run.has_memory for run in runs)
    figure, axes = panels(1 + (baseline is not None) + with_null, height=4.6)
    rest = iter(axes[0])
    _losses(next(rest), baseline, runs, looks)
    if baseline is not None:
        _gains(next(rest), baseline, runs, looks)
    if with_null:
        _null_weights(next(rest), [run for run in runs if run.has_memory], looks)
    return figure


def _losses(
    axis: Axes, baseline: DecileRun | None, runs: Sequence[DecileRun], looks: Mapping[str, Line]
) -> None:
    for run in runs if baseline is None else (baseline, *runs):
        x, y = points(run.loss_by_slot)
        look = looks[run.label]
        size = None if run is baseline else 5
        axis.plot(x, y, f"{look.marker}{look.dash}", color=look.colour, label=run.label, markersize=size)
    _room_above(axis)
    decile_axis(axis, "target token")
    label(axis, "Held-out loss", axis.get_xlabel(), "cross entropy (nats per token)")
    legend(axis, place="lower left", size=10)


def _gains(axis: Axes, baseline: DecileRun, runs: Sequence[DecileRun], looks: Mapping[str, Line]) -> None:
    width = 0.8 / len(runs)
    for i, run in enumerate(runs):
        gains: dict[str, float | None] = {}
        for slot in DECILES:
            before, after = baseline.loss_by_slot[slot], run.loss_by_slot[slot]
            gains[slot] = None if before is None or after is None else before - after
        x, y = points(gains)
        middle = [v + width * (i - (len(runs) - 1) / 2) for v in x]
        bars = axis.bar(middle, y, width, color=looks[run.label].colour, label=run.label)
        if len(runs) == 1:
            axis.bar_label(bars, fmt="%.3f", fontsize=7, padding=2)
    axis.axhline(0, color="black", linewidth=0.8)
    _room_above(axis)
    decile_axis(axis, "target token")
    title = f"Gain over {baseline.label} (higher is better)"
    label(axis, title, axis.get_xlabel(), "loss reduction (nats per token)")
    if len(runs) > 1:
        legend(axis, inside=0)  # bars leave no room within


def _null_weights(axis: Axes, runs: Sequence[DecileRun], looks: Mapping[str, Line]) -> None:
    for run in runs:
        prefix = f"{run.label}, " if len(runs) > 1 else ""
        look = looks[run.label]
        x, y = points(run.null_mean_by_slot)
        axis.plot(x, y, f"{look.marker}-", color=look.colour, label=f"{prefix}mean over layers")
        x, y = points(run.null_last_by_slot)
        text = f"{prefix}last layer"
        axis.plot(x, y, f"{look.marker}:", color=look.colour, label=text, markerfacecolor="white")
    axis.set_ylim(0, 1.1)
    axis.set_yticks([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    decile_axis(axis, "input token")
    label(axis, "Null-bank weight", axis.get_xlabel(), "mean router weight (0 to 1)")
    legend(axis)


def points(by_slot: Mapping[str, float | None]) -> tuple[list[int], list[float]]:
    """Return x and y of the deciles that have a finite value."""
    known = [(int(slot), by_slot.get(slot)) for slot in DECILES]
    found = [(x, y) for x, y in known if y is not None and math.isfinite(y)]
    return [x for x, _ in found], [y for _, y in found]


def _room_above(axis: Axes) -> None:
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + _HEADROOM * (high - low))
