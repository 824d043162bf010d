"""Training loss against tokens, for the baseline and every K (paper, Figure 14).

Reads the losses that each run logged, smooths them, and compares them with the baseline's.

Shapes: N log lines.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tide_mega.lab.figures.analysis import Analysis, SkippedError
from tide_mega.lab.figures.kit import caution
from tide_mega.lab.figures.section import DataTable, Section
from tide_mega.lab.plotting import Line, label, legend, lines, panels
from tide_mega.metrics.jsonl import read_metrics
from tide_mega.trained.run import TrainedRun

Losses = NDArray[np.float64]

LINES_A_WINDOW = 40
"""The smoothing window grows by one log line per this many lines of the curve."""


@dataclass(frozen=True, eq=False)
class Curve:
    """Losses of one run by training tokens, ascending; nats per token."""

    label: str
    num_blocks: int
    tokens: NDArray[np.int64]
    """[N]."""
    loss: Losses
    """[N]: of the steps since the line before."""
    smooth: Losses
    """[N]: `running_mean` over `window` lines."""
    window: int
    held_out: dict[int, float]
    """Loss on held-out text, by training tokens."""
    left_out: int
    """Lines whose loss is not finite."""

    def at(self, tokens: float) -> float | None:
        """Return the smoothed loss between log lines; None outside."""
        if not self.tokens[0] <= tokens <= self.tokens[-1]:
            return None
        return float(np.interp(tokens, self.tokens, self.smooth))


def read_curve(metrics: Path, label: str, num_blocks: int, until: int) -> Curve:
    """Read the lines of metrics.jsonl up to step `until`."""
    records = [record for record in read_metrics(metrics) if record["step"] <= until]
    trained, held_out = _by_tokens(records, "train"), _by_tokens(records, "eval")
    finite = {tokens: loss for tokens, loss in trained.items() if math.isfinite(loss)}
    return make_curve(
        label,
        num_blocks,
        finite,
        {tokens: loss for tokens, loss in held_out.items() if math.isfinite(loss)},
        left_out=len(trained) - len(finite),
    )


def make_curve(
    label: str, num_blocks: int, trained: dict[int, float], held_out: dict[int, float], left_out: int = 0
) -> Curve:
    """Smooth losses given by training tokens."""
    tokens = np.array(sorted(trained), dtype=np.int64)
    loss = np.array([trained[count] for count in sorted(trained)], dtype=np.float64)
    window = 1 + 2 * (len(loss) // (2 * LINES_A_WINDOW))
    smooth = running_mean(loss, window)
    return Curve(label, num_blocks, tokens, loss, smooth, window, dict(sorted(held_out.items())), left_out)


def running_mean(values: Losses, window: int) -> Losses:
    """Average over a centred window of `window` (odd) values.

    Near the start, where losses fall steeply, the window shrinks symmetrically; near the end it covers the half
    window before and whatever comes after, so that the last value is not a single line's.
    """
    if window % 2 == 0 or window < 1:
        raise ValueError(f"a centred window has an odd number of values, not {window}")
    if window == 1:
        return values
    sums = np.concatenate([[0.0], np.cumsum(values)])
    i = np.arange(len(values))
    half = np.minimum(i, window // 2)
    last = np.minimum(i + half, len(values) - 1)
    return (sums[last + 1] - sums[i - half]) / (last + 1 - i + half)


def difference(curve: Curve, base: Curve) -> tuple[Losses, Losses]:
    """Return tokens, and the smoothed loss minus the baseline's, at the curve's lines that the baseline spans.

    Between its lines the baseline is interpolated.
    """
    inside = (curve.tokens >= base.tokens[0]) & (curve.tokens <= base.tokens[-1])
    tokens = curve.tokens[inside].astype(np.float64)
    return tokens, curve.smooth[inside] - np.interp(tokens, base.tokens, base.smooth)


def held_out_difference(curve: Curve, base: Curve) -> dict[int, float]:
    """Return the held-out loss minus the baseline's, by tokens, where both were evaluated."""
    return {
        tokens: loss - base.held_out[tokens]
        for tokens, loss in curve.held_out.items()
        if tokens in base.held_out
    }


def reaches(curve: Curve, loss: float) -> float | None:
    """Return after how many tokens the smoothed loss first is at most `loss`, interpolated; None if never."""
    low = np.flatnonzero(curve.smooth <= loss)
    if not len(low):
        return None
    i = int(low[0])
    if i == 0:
        return float(curve.tokens[0])
    before, after = curve.smooth[i - 1], curve.smooth[i]
    part = (before - loss) / (before - after)
    return float(curve.tokens[i - 1] + part * (curve.tokens[i] - curve.tokens[i - 1]))


def _by_tokens(records: list[dict[str, Any]], kind: str) -> dict[int, float]:
    # Of lines repeated after a restart, the last counts.
    return {
        record["tokens"]: float(record["loss"])
        for record in records
        if record.get("kind") == kind and record.get("loss") is not None
    }


STEEP = 0.05
"""Initial share of the tokens whose steep fall may be cut off in the figure."""
MOST_MARKERS = 40
_UNITS = ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))


def draw(curves: Sequence[Curve], looks_by_label: Mapping[str, Line] | None = None) -> Figure:
    """Draw the losses and, if there is a baseline to compare with, the differences from it.

    Pass `looks` if other figures show more runs than these curves.
    """
    if looks_by_label is None:
        looks = lines([curve.num_blocks for curve in curves])
    else:
        looks = [looks_by_label[curve.label] for curve in curves]
    base = next((i for i, curve in enumerate(curves) if curve.num_blocks == 0), None)
    others = [i for i in range(len(curves)) if i != base]
    with_difference = base is not None and bool(others)
    figure, axes = panels(1 + with_difference, width=6.4, height=4.6)
    scale, unit = token_unit(max(float(curve.tokens[-1]) for curve in curves))
    x_label = f"training tokens ({unit})" if unit else "training tokens"
    for curve, look in zip(curves, looks, strict=True):
        _draw_loss(axes[0, 0], curve, look, scale)
    _end_axis(
        axes[0, 0],
        [
            *(_later(curve, curve.tokens, curve.smooth) for curve in curves),
            *(np.array(list(curve.held_out.values())) for curve in curves),
        ],
    )
    label(axes[0, 0], "Loss (line: training, markers: held-out)", x_label, "cross entropy (nats per token)")
    legend(axes[0, 0], inside=6)
    if with_difference and base is not None:
        axis = axes[0, 1]
        for i in others:
            _draw_difference(axis, curves[i], curves[base], looks[i], scale)
        gaps = [_later(curves[i], *difference(curves[i], curves[base])) for i in others]
        _end_axis(axis, [np.zeros(1), *gaps])
        axis.axhline(0, color=looks[base].colour, linestyle="--", linewidth=1, zorder=0)
        label(
            axis,
            f"Difference to {curves[base].label} (lower is better)",
            x_label,
            "difference (nats per token)",
        )
        legend(axis, inside=1)
    for axis in axes[0]:
        axis.set_xlim(left=0)
    return figure


def token_unit(largest: float) -> tuple[float, str]:
    """Return the divisor for token counts up to `largest`, and the unit's name."""
    return next(((scale, unit) for scale, unit in _UNITS if largest >= scale), (1.0, ""))


def _draw_loss(axis: Axes, curve: Curve, look: Line, scale: float) -> None:
    if curve.window > 1:
        axis.plot(curve.tokens / scale, curve.loss, color=look.colour, linewidth=0.6, alpha=0.25)
    axis.plot(
        curve.tokens / scale, curve.smooth, look.dash, color=look.colour, linewidth=1.6, label=curve.label
    )
    _draw_markers(axis, curve.held_out, look, scale)


def _draw_difference(axis: Axes, curve: Curve, base: Curve, look: Line, scale: float) -> None:
    tokens, gaps = difference(curve, base)
    axis.plot(tokens / scale, gaps, look.dash, color=look.colour, linewidth=1.6, label=curve.label)
    _draw_markers(axis, held_out_difference(curve, base), look, scale)


def _draw_markers(axis: Axes, values: dict[int, float], look: Line, scale: float) -> None:
    every = -(-len(values) // MOST_MARKERS) or 1
    chosen = list(values.items())[::-1][::every]
    axis.plot(
        [tokens / scale for tokens, _ in chosen],
        [loss for _, loss in chosen],
        look.marker,
        color=look.colour,
        markeredgecolor="black",
        markeredgewidth=0.6,
        markersize=6,
    )


def _end_axis(axis: Axes, shown: Sequence[np.ndarray]) -> None:
    """Limit the axis to these values, so that the curves can be told apart."""
    values = np.concatenate([part for part in shown if len(part)])
    low, high = float(values.min()), float(values.max())
    margin = 0.05 * (high - low) or 0.1
    axis.set_ylim(low - margin, high + margin)


def _later(curve: Curve, tokens: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The part after the steep start."""
    return values[tokens >= STEEP * curve.tokens[-1]]


SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
"""Shares of the tokens common to all runs at which the table gives losses."""
MOST_POINTS = 500
"""Per run, in the table of points."""

PAPER = (
    "The training losses of the base model and of TIDE-1B with 2 to 24 blocks are ordered by K, the largest "
    "lowest (Figure 14)."
)


def run(analysis: Analysis) -> Section:
    """Read what the runs logged while training; see `Section`."""
    notes: list[str] = []
    curves: list[Curve] = []
    shown: list[TrainedRun] = []
    for one in analysis.runs:
        curve = read_curve(one.metrics, one.label, one.num_blocks, one.step) if one.metrics.exists() else None
        if curve is None or not len(curve.tokens):
            notes.append(f"{one.label} is left out: it logged no training loss up to step {one.step:,}.")
            continue
        if curve.left_out:
            notes.append(f"{one.label}: {curve.left_out} log lines whose loss is not finite are left out.")
        curves.append(curve)
        shown.append(one)
    if not curves:
        raise SkippedError("it needs a run with a metrics.jsonl that has training losses")
    notes += caution(shown)
    notes += describe_smoothing(curves)
    notes.append(
        f"The axes span what follows the first {STEEP:.0%} of each run's tokens: what lies outside stands in "
        "the data."
    )
    return Section(
        paper=PAPER,
        findings=tuple(describe(curves)),
        tables={"curves": milestones(curves), "points": points(curves)},
        figures={"curves": draw(curves, analysis.looks)},
        notes=tuple(notes),
    )


def baseline(curves: Sequence[Curve]) -> Curve | None:
    """Return the first curve without memory, if others can be compared with it."""
    return next((curve for curve in curves if curve.num_blocks == 0), None) if len(curves) > 1 else None


def milestones(curves: Sequence[Curve]) -> DataTable:
    """Losses at equal token counts, and their differences from the baseline."""
    base = baseline(curves)
    columns = ["training tokens"]
    for curve in curves:
        columns.append(f"{curve.label} loss (nats)")
        if base is not None and curve is not base:
            columns.append(f"{curve.label} minus {base.label} (nats)")
    last = min(curve.tokens[-1] for curve in curves)
    rows = []
    for share in SHARES:
        tokens = round(share * last)
        cells: list[float | None] = [tokens]
        for curve in curves:
            loss = curve.at(tokens)
            cells.append(loss)
            if base is not None and curve is not base:
                before = base.at(tokens)
                cells.append(None if loss is None or before is None else loss - before)
        rows.append(cells)
    return DataTable.of(columns, rows)


def points(curves: Sequence[Curve]) -> DataTable:
    """The drawn points, thinned evenly to `MOST_POINTS` per run; the runs' metrics.jsonl have all of them."""
    rows: list[tuple[str, str, int, float, float | None]] = []
    for curve in curves:
        every = -(-len(curve.tokens) // MOST_POINTS)
        chosen = range(len(curve.tokens) - 1, -1, -every)
        rows += [
            (curve.label, "training", int(curve.tokens[i]), float(curve.loss[i]), float(curve.smooth[i]))
            for i in reversed(chosen)
        ]
        rows += [(curve.label, "held-out", tokens, loss, None) for tokens, loss in curve.held_out.items()]
    return DataTable.of(("run", "text", "training tokens", "loss (nats)", "smoothed (nats)"), rows)


def describe(curves: Sequence[Curve]) -> list[str]:
    """Say where the curves end, how they differ, and when they reach the baseline's last loss."""
    base = baseline(curves)
    findings = []
    for curve in curves:
        last = f"{curve.smooth[-1]:.3f} nats of training loss after {curve.tokens[-1]:,} tokens"
        sentence = f"{curve.label} ends at {last}"
        if curve.held_out:
            tokens, loss = next(reversed(curve.held_out.items()))
            sentence += f" and {loss:.3f} nats on held-out text after {tokens:,}"
        findings.append(sentence + ".")
        if base is None or curve is base:
            continue
        findings.append(_compared(curve, base))
    memory = [curve for curve in curves if curve.num_blocks]
    if len(memory) > 1:
        common = min(int(curve.tokens[-1]) for curve in memory)
        known = [(at, curve) for curve in memory if (at := curve.at(common)) is not None]
        if len(known) > 1:
            ordered = [curve for _, curve in sorted(known, key=lambda one: one[0])]
            names = " < ".join(f"{curve.label} (K = {curve.num_blocks})" for curve in ordered)
            findings.append(f"Training losses after {common:,} tokens, the lowest first: {names}.")
    return findings


def describe_smoothing(curves: Sequence[Curve]) -> list[str]:
    """Say how each curve was smoothed."""
    return [
        f"{curve.label}: each point is the mean of {curve.window} log lines around it, fewer near the ends; "
        "single lines are drawn faint."
        if curve.window > 1
        else f"{curve.label}: the log has {len(curve.tokens)} lines and is not smoothed."
        for curve in curves
    ]


def _compared(curve: Curve, base: Curve) -> str:
    tokens, gaps = difference(curve, base)
    if not len(tokens):
        return f"{curve.label} and {base.label} have no training tokens in common to compare them at."
    below = sum(gap < 0 for gap in gaps) / len(gaps)
    sentence = (
        f"{curve.label} is below {base.label} at {below:.0%} of {len(gaps)} token counts; the difference "
        "after "
        f"{tokens[-1]:,.0f} is {gaps[-1]:+.3f} nats"
    )
    reached = reaches(curve, float(base.smooth[-1]))
    if reached is None:
        return f"{sentence}; it does not reach {base.label}'s last training loss."
    part = reached / float(base.tokens[-1])
    return (
        f"{sentence}; it has {base.label}'s last training loss after {reached:,.0f} tokens, {part:.0%} of "
        "its."
    )
