"""Perplexity curves as tables and sentences."""

from collections.abc import Sequence
from itertools import pairwise

from tide_mega.diagnostics.perplexity.curves import TextCurve, baseline, reaches
from tide_mega.diagnostics.section import DataTable
from tide_mega.metrics.slots import SLOTS


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
    """Say where the runs end on a text, and when each reaches the baseline's end; all curves are of one text."""
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
