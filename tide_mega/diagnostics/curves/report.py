"""Training loss against tokens, for the baseline and every K (paper, Figure 14)."""

from collections.abc import Sequence

from tide_mega.diagnostics.analysis import Analysis, SkippedError
from tide_mega.diagnostics.base_models import caution
from tide_mega.diagnostics.curves.plot import STEEP, draw
from tide_mega.diagnostics.curves.points import Curve, difference, reaches, read_curve
from tide_mega.diagnostics.section import DataTable, Section
from tide_mega.trained.run import TrainedRun

SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
"""Of the tokens that all runs have, at which losses stand in the table."""
MOST_POINTS = 500
"""Of each run in the table of points."""

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
    """Losses at the same token counts, and their differences to the baseline."""
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
    """What is drawn, thinned evenly to `MOST_POINTS` a run; all of it is in the runs' metrics.jsonl."""
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
    """State what was done to each curve."""
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
