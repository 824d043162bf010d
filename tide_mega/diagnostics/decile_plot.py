"""The decile comparison as a figure: losses, gains, and the null bank's weight."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tide_mega.diagnostics.decile_rows import ROLES
from tide_mega.diagnostics.decile_run import DECILES, DecileRun

# Okabe and Ito's palette: told apart with any colour vision; markers differ too.
_BASELINE = "#4d4d4d"
_RUNS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "osD^vP"


def plot_deciles(baseline: DecileRun, runs: Sequence[DecileRun], path: Path) -> None:
    """Write the figure of `draw_deciles` as a PNG."""
    draw_deciles(baseline, runs).savefig(path, format="png")


def draw_deciles(baseline: DecileRun, runs: Sequence[DecileRun]) -> Figure:
    """Losses per decile, gains over the baseline, and null weights where a run has memory."""
    with_memory = [run for run in runs if run.has_memory]
    columns = 3 if with_memory else 2
    figure = Figure(figsize=(5.2 * columns, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns)
    _losses(axes[0], baseline, runs)
    _gains(axes[1], baseline, runs)
    if with_memory:
        _null_weights(axes[2], [(run, i) for i, run in enumerate(runs) if run.has_memory])
    for axis in axes:
        _frequency_axis(axis)
    return figure


def _losses(axis: Axes, baseline: DecileRun, runs: Sequence[DecileRun]) -> None:
    axis.plot(*_points(baseline.loss_by_slot), "X--", color=_BASELINE, label=baseline.label)
    for i, run in enumerate(runs):
        axis.plot(*_points(run.loss_by_slot), f"{_MARKERS[i % 6]}-", color=_RUNS[i % 6], label=run.label)
    axis.margins(y=0.1)
    axis.set_title("Held-out loss")
    axis.set_ylabel("cross entropy (nats per token)")
    axis.legend(frameon=False)


def _gains(axis: Axes, baseline: DecileRun, runs: Sequence[DecileRun]) -> None:
    width = 0.8 / len(runs)
    for i, run in enumerate(runs):
        gains: dict[str, float | None] = {}
        for slot in DECILES:
            before, after = baseline.loss_by_slot[slot], run.loss_by_slot[slot]
            gains[slot] = None if before is None or after is None else before - after
        x, y = _points(gains)
        bars = axis.bar(
            [v + width * (i - (len(runs) - 1) / 2) for v in x], y, width, color=_RUNS[i % 6], label=run.label
        )
        if len(runs) == 1:
            axis.bar_label(bars, fmt="%.3f", fontsize=7, padding=2)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.margins(y=0.12)  # room for the labels
    axis.set_title(f"Gain over {baseline.label} (higher is better)")
    axis.set_ylabel("loss reduction (nats per token)")
    if len(runs) > 1:
        axis.legend(frameon=False)


def _null_weights(axis: Axes, runs: Sequence[tuple[DecileRun, int]]) -> None:
    for run, i in runs:
        prefix = f"{run.label}, " if len(runs) > 1 else ""
        color, marker = _RUNS[i % 6], _MARKERS[i % 6]
        axis.plot(
            *_points(run.null_mean_by_slot), f"{marker}-", color=color, label=f"{prefix}mean over layers"
        )
        axis.plot(
            *_points(run.null_last_by_slot),
            f"{marker}:",
            color=color,
            label=f"{prefix}last layer",
            markerfacecolor="white",
        )
    axis.set_ylim(0, 1.1)
    axis.set_yticks([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    axis.set_title("Null-bank weight")
    axis.set_ylabel("mean router weight (0 to 1)")
    axis.set_xlabel("decile of the input token")
    axis.legend(frameon=False)


def _frequency_axis(axis: Axes) -> None:
    low = -0.5
    for i, (role, deciles) in enumerate(ROLES.items()):
        high = low + len(deciles)
        if i % 2 == 0:
            axis.axvspan(low, high, color="#f2f2f2", zorder=0)
        axis.annotate(
            role,
            ((low + high) / 2, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, -4),
            textcoords="offset points",
            ha="center",
            va="top",
            color="#555555",
            fontsize=9,
        )
        low = high
    axis.set_xlim(-0.5, len(DECILES) - 0.5)
    axis.set_xticks(range(len(DECILES)), ["0\nrarest", *DECILES[1:-1], "9\ncommonest"])
    if not axis.get_xlabel():
        axis.set_xlabel("frequency decile of the target token")
    axis.spines[["top", "right"]].set_visible(False)


def _points(by_slot: dict[str, float | None]) -> tuple[list[int], list[float]]:
    known = [(int(slot), by_slot.get(slot)) for slot in DECILES]
    points = [(x, y) for x, y in known if y is not None and math.isfinite(y)]
    return [x for x, _ in points], [y for _, y in points]
