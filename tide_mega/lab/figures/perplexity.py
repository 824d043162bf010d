"""Perplexity of texts and of the held-out split against training tokens (paper, Figure 8).

Makes the section's tables, sentences and figure, with one panel per text and one line per run.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from tide_mega.data.loader import TokenBatch
from tide_mega.data.texts import TextSet, load_texts
from tide_mega.lab.figures.analysis import Analysis
from tide_mega.lab.figures.curves import token_unit
from tide_mega.lab.figures.kit import caution
from tide_mega.lab.figures.perplexity_curves import (
    Point,
    TextCurve,
    baseline,
    digest,
    join,
    label_bytes,
    logged_points,
    reaches,
    relative_to,
    score,
    spread,
)
from tide_mega.lab.figures.section import DataTable, Section
from tide_mega.lab.plotting import Line, label, lines, panels
from tide_mega.metrics.deciles import SLOTS
from tide_mega.trained.run import TrainedRun


def perplexity_table(by_text: Sequence[Sequence[TextCurve]]) -> DataTable:
    """Every point."""
    columns = (
        *("text", "run", "K", "training tokens", "step", "evaluated", "scored tokens", "perplexity"),
        *("loss (nats)", "bits per byte", "rare loss (nats)", "mid loss (nats)", "common loss (nats)"),
    )
    rows = []
    for curve in (curve for curves in by_text for curve in curves):
        for point in curve.points:
            result = point.result
            how = "in training" if point.is_logged else "from the checkpoint"
            rows.append(
                (
                    *(curve.text, curve.label, curve.num_blocks, point.tokens, point.step, how),
                    *(result.tokens, result.perplexity, result.loss, result.bits_per_byte),
                    *(result.rare, result.mid, result.common),
                )
            )
    return DataTable.of(columns, rows)


def decile_table(by_text: Sequence[Sequence[TextCurve]]) -> DataTable:
    """Loss by decile of the training text at each run's last point."""
    columns = ("text", "run", "K", "decile of the token", "scored tokens", "loss (nats)")
    rows = [
        (curve.text, curve.label, curve.num_blocks, slot, curve.scored[slot], result.loss_by_bin[slot])
        for curves in by_text
        for curve in curves
        for result in [curve.last.result]
        for slot in SLOTS
    ]
    return DataTable.of(columns, rows)


def describe(curves: Sequence[TextCurve], *, compare: bool = True) -> list[str]:
    """Say where the runs end on a text and when each reaches the baseline's last value; curves of one text."""
    base = baseline(curves) if compare else None
    ends = [_end(curve, base) for curve in curves]
    found = [f"Last perplexity on {curves[0].text}: {'; '.join(ends)}{_order(curves) if compare else ''}."]
    others = [curve for curve in curves if curve.num_blocks]
    if base is not None and others:
        found.append(
            f"{base.label}'s last perplexity on {base.text} takes it {base.last.tokens:,} training tokens: "
            f"{'; '.join(_when(curve, base) for curve in others)}."
        )
    return found


def _end(curve: TextCurve, base: TextCurve | None) -> str:
    result = curve.last.result
    words = (
        f"{curve.label} (K = {curve.num_blocks}) {result.perplexity:,.2f} after {curve.last.tokens:,} tokens"
    )
    if base is None or curve is base:
        return words
    before = base.last.result
    change = 100 * (result.perplexity / before.perplexity - 1)
    words += f", {abs(change):.1f} % {'lower' if change < 0 else 'higher'} than {base.label}"
    gains = [
        f"{name} {mine - theirs:+.3f}"
        for name, mine, theirs in (
            ("rare", result.rare, before.rare),
            ("mid", result.mid, before.mid),
            ("common", result.common, before.common),
        )
        if mine is not None and theirs is not None
    ]
    return f"{words} (loss {result.loss - before.loss:+.3f} nats: {', '.join(gains)})" if gains else words


def _order(curves: Sequence[TextCurve]) -> str:
    by_blocks = sorted(curves, key=lambda curve: curve.num_blocks)
    steps = [
        after.last.result.perplexity < before.last.result.perplexity
        for before, after in pairwise(by_blocks)
        if after.num_blocks > before.num_blocks
    ]
    if len(steps) < 2:
        return ""
    if all(steps):
        return "; it falls with every larger K"
    return f"; it falls at {sum(steps)} of {len(steps)} steps to a larger K"


def _when(curve: TextCurve, base: TextCurve) -> str:
    target = base.last.result.perplexity
    tokens = reaches(curve.points, target)
    if tokens is None:
        return f"{curve.label} does not reach it within {curve.last.tokens:,}"
    share = f"({100 * tokens / base.last.tokens:.0f} % of these)"
    if tokens == curve.points[0].tokens:
        return f"{curve.label} needs {curve.points[0].tokens:,} at most, its first point {share}"
    return f"{curve.label} needs {tokens:,.0f} {share}"


_COLUMNS = 3
_MOST_MARKERS = 16
_LOG_FROM = 5.0
"""Ratio of the largest to the smallest perplexity from which the axis is logarithmic."""


def draw(by_text: Sequence[Sequence[TextCurve]]) -> Figure:
    """Draw the curves of each text; every run has the same look in all panels."""
    figure, axes, looks, scale = _grid(by_text, "perplexity")
    for axis, curves in zip(axes, by_text, strict=True):
        _draw_text(axis, curves, looks, scale)
    _legend(figure, axes[0])
    return figure


def draw_relative(by_text: Sequence[Sequence[TextCurve]]) -> Figure | None:
    """Draw each run's perplexity relative to the baseline's; None if there is nothing to compare."""
    compared = [
        curves
        for curves in by_text
        if (base := baseline(curves)) is not None
        and any(relative_to(curve, base) for curve in curves if curve is not base)
    ]
    if not compared:
        return None
    figure, axes, looks, scale = _grid(compared, "perplexity relative to the baseline (%)")
    for axis, curves in zip(axes, compared, strict=True):
        base = baseline(curves)
        assert base is not None
        axis.axhline(0, color=looks[base.label].colour, linestyle="--", linewidth=1, label=base.label)
        for curve in curves:
            if curve is not base:
                points = [point for point in relative_to(curve, base) if math.isfinite(point[1])]
                _plot(axis, curve, looks[curve.label], points, scale)
        axis.set_xlim(left=0)
    _legend(figure, axes[0])
    return figure


def _grid(
    by_text: Sequence[Sequence[TextCurve]], what: str
) -> tuple[Figure, list[Axes], dict[str, Line], float]:
    """Make a panel for each text; return them, the look of every run, and the divisor of token counts."""
    runs = {curve.label: curve.num_blocks for curves in by_text for curve in curves}
    looks = dict(zip(runs, lines(list(runs.values())), strict=True))
    columns = 2 if len(by_text) == 4 else min(len(by_text), _COLUMNS)
    rows = math.ceil(len(by_text) / columns)
    figure, axes = panels(columns, rows, width=5.2 if columns > 1 else 6.4)
    scale, unit = token_unit(max(curve.last.tokens for curves in by_text for curve in curves))
    flat = list(axes.ravel())
    for axis, curves in zip(flat, by_text, strict=False):
        tokens = f"training tokens ({unit})" if unit else "training tokens"
        label(axis, f"{curves[0].text} ({curves[0].last.result.tokens:,} tokens)", tokens, what)
    for axis in flat[len(by_text) :]:
        axis.remove()
    return figure, flat[: len(by_text)], looks, scale


def _legend(figure: Figure, axis: Axes) -> None:
    """Put one legend below all panels."""
    columns = max(2, round(figure.get_figwidth() / 2.2))
    figure.legend(*axis.get_legend_handles_labels(), frameon=False, ncols=columns, loc="outside lower center")


def _draw_text(axis: Axes, curves: Sequence[TextCurve], looks: dict[str, Line], scale: float) -> None:
    base = baseline(curves)
    for curve in curves:
        points = [(point.tokens, point.result.perplexity) for point in curve.points]
        points = [point for point in points if math.isfinite(point[1])]
        _plot(axis, curve, looks[curve.label], points, scale)
        if curve is base and len(curves) > 1 and points:
            axis.axhline(
                points[-1][1],
                color=looks[curve.label].colour,
                linestyle=":",
                linewidth=1,
                zorder=0,
                label=f"{curve.label} at its end",
            )
    axis.set_xlim(left=0)
    _scale(axis, [point.result.perplexity for curve in curves for point in curve.points])


def _plot(
    axis: Axes, curve: TextCurve, look: Line, points: Sequence[tuple[int, float]], scale: float
) -> None:
    """Draw a line with a marker at every point or, if there are many, at checkpoints or evenly."""
    at_checkpoint = {point.tokens for point in curve.points if not point.is_logged}
    marked: Sequence[int] = range(len(points))
    if len(points) > _MOST_MARKERS:
        measured = [i for i in marked if points[i][0] in at_checkpoint]
        marked = measured or spread(marked, _MOST_MARKERS)
    axis.plot(
        [tokens / scale for tokens, _ in points],
        [value for _, value in points],
        look.dash,
        marker=look.marker,
        markevery=list(marked),
        color=look.colour,
        linewidth=1.6,
        markersize=5.5,
        label=curve.label,
    )


def _scale(axis: Axes, values: list[float]) -> None:
    values = [value for value in values if math.isfinite(value)]
    if values and max(values) > _LOG_FROM * min(values):
        axis.set_yscale("log")
        span = math.log10(max(values) / min(values))
        steps = (1, 1.5, 2, 3, 4, 5, 6, 8) if span < 0.8 else (1, 2, 3, 5) if span < 2 else (1, 3)
        axis.yaxis.set_major_locator(LogLocator(subs=steps, numticks=20))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


MOST_CHECKPOINTS = 8
"""Scored per run."""
HELD_OUT, IN_TRAINING = "held-out split", "held-out split, in training"
PAPER = (
    "On WikiText-2, PubMed and DCLM every TIDE-1B model has a lower perplexity than the baseline throughout 200 "
    "billion tokens, lower with every K from 2 to 24; K = 2 to 4 after 100 billion tokens equals the baseline "
    "after 200 billion."
)


@dataclass
class _Found:
    """Curves by text, and notes on how they were obtained."""

    by_text: dict[str, list[TextCurve]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, text: str, run: TrainedRun, points: Sequence[Point]) -> None:
        curve = TextCurve(text, run.label, run.num_blocks, tuple(points))
        self.by_text.setdefault(text, []).append(curve)


def run(analysis: Analysis) -> Section:
    """Score the texts with every run's checkpoints, and add the runs' logged evaluations; see `Section`.

    Raises:
        ConfigError: a text does not exist, or two have the same name.
        DataError: a text or the held-out split cannot be read.
    """
    options = analysis.options
    texts = load_texts(
        options.texts,
        analysis.runs[0].tokenizer,
        max_tokens=options.text_tokens,
        max_document_bytes=options.max_document_bytes,
        key="texts",
        vocab_size=min(one.config.model.vocab_size for one in analysis.runs),
    )
    found = _Found()
    digests = {one.label: _measure(analysis, one, texts, found) for one in analysis.runs}
    if not texts:
        found.notes.append(
            "No text was given: texts=<file>,<file> adds WikiText-2 or others to the held-out split."
        )
    same_split = len(set(digests.values())) == 1
    if not same_split:
        found.notes.append(
            "The runs' held-out splits differ (other data or sequence length), so perplexities on them are not "
            "compared."
        )
    apart = {HELD_OUT, IN_TRAINING} if not same_split else set()
    logged = found.by_text.get(IN_TRAINING, [])
    if any(curve.scored != logged[0].scored for curve in logged):
        apart.add(IN_TRAINING)
        found.notes.append("The runs' evaluations in training scored different tokens and are not compared.")
    found.notes += _differing_settings(analysis.runs)
    names = [*(text.name for text in texts), HELD_OUT, IN_TRAINING]
    by_text = [found.by_text[name] for name in names if name in found.by_text]
    figures = {"perplexity": draw(by_text)}
    relative = draw_relative([curves for curves in by_text if curves[0].text not in apart])
    if relative is not None:
        figures["relative"] = relative
    return Section(
        paper=PAPER,
        findings=tuple(
            sentence
            for curves in by_text
            for sentence in describe(curves, compare=curves[0].text not in apart)
        ),
        tables={"perplexity": perplexity_table(by_text), "by_decile": decile_table(by_text)},
        figures=figures,
        notes=tuple(found.notes),
    )


def _measure(analysis: Analysis, run: TrainedRun, texts: Sequence[TextSet], found: _Found) -> str:
    """Add a run's curves; return what identifies its held-out sequences."""
    options, seq_length = analysis.options, run.config.data.seq_length
    held_out = analysis.held_out(run)
    sets: dict[str, tuple[list[TokenBatch], int]] = {
        text.name: (list(text.batches(seq_length, options.batch)), text.num_bytes) for text in texts
    }
    sets[HELD_OUT] = (held_out, label_bytes(held_out, run.tokenizer))
    history = run.history
    if all(weights.step != run.step for weights in history):  # stored elsewhere than the others
        history = [*history, run.weights]
    chosen = spread(history, MOST_CHECKPOINTS)
    if len(chosen) < len(history):
        steps = ", ".join(f"{weights.step:,}" for weights in chosen)
        found.notes.append(
            f"{run.label}: {len(chosen)} of {len(history)} checkpoints were scored, those of steps {steps}."
        )
    measured: dict[str, list[Point]] = {name: [] for name in sets}
    for weights in chosen:
        model = analysis.model(run, weights)
        for name, (batches, num_bytes) in sets.items():
            result = score(model, batches, num_bytes)
            measured[name].append(Point(run.tokens_at(weights), weights.step, result, is_logged=False))
        del model  # before the next is built: the analysis holds one at a time
    logged, logged_held_out = logged_points(run.metrics, run.step)
    for name, points in measured.items():
        found.add(name, run, _joined(run, name, points, logged.pop(name, []), found.notes))
    for name, points in logged.items():
        found.notes.append(
            f"{run.label} logged {len(points)} evaluations of {name} in training, which is not among the "
            "texts here."
        )
    if logged_held_out:
        found.add(IN_TRAINING, run, logged_held_out)
    return digest(held_out)


def _joined(
    run: TrainedRun, name: str, measured: Sequence[Point], logged: Sequence[Point], notes: list[str]
) -> Sequence[Point]:
    joined = join(measured, logged)
    if joined.shared:
        notes.append(
            f"{run.label} on {name}: at {joined.shared} checkpoints the loss logged in training and the one "
            f"measured here differ by {joined.largest_difference:.1e} nats at most."
        )
    if joined.left_out:
        notes.append(
            f"{run.label} on {name}: {joined.left_out} evaluations in training scored other tokens of it (see "
            "data.perplexity_tokens and text_tokens) and are left out."
        )
    return joined.points


def _differing_settings(runs: Sequence[TrainedRun]) -> list[str]:
    notes = caution(runs)
    lengths = {run.label: run.config.data.seq_length for run in runs}
    if len(set(lengths.values())) > 1:
        each = ", ".join(f"{name} {length:,}" for name, length in lengths.items())
        notes.append(f"Sequence lengths differ, and with them the context of every token: {each}.")
    # Only the tokenizer's types: `bins` also has the rows that pad the vocabulary.
    if any(not np.array_equal(run.deciles.bin_of_type, runs[0].deciles.bin_of_type) for run in runs):
        notes.append("The runs' frequency deciles differ: rare, mid and common are each run's own.")
    return notes
