"""A run in a line, and what the dashboard does not show of it."""

import math
from collections.abc import Iterable

from tide_mega.dashboard.history import RunHistory
from tide_mega.dashboard.layout import SECTIONS, uncovered
from tide_mega.dashboard.panel import charts

_FIGURES = (
    ("train/loss", "training loss"),
    ("eval/loss", "held-out loss"),
    ("loss/rare", "rare"),
    ("loss/mid", "mid"),
    ("loss/common", "common"),
)


def summary(run: RunHistory) -> str:
    """Return a line: how far the run came, and its last losses in nats per token."""
    if not run.rows:
        return f"{run.label}: nothing was logged in {run.source}"
    last = max(run.rows, key=lambda row: row["step"])
    parts = [
        f"{len(run.rows)} records, {len(run.names())} metrics",
        f"step {last['step']:,}",
        f"{last['tokens']:,} tokens",
    ]
    for name, words in _FIGURES:
        if len(values := run.series(name).value):
            parts.append(f"{words} {values[-1]:.3f}")
    return f"{run.label}: {', '.join(parts)} ({run.source})"


def remarks(run: RunHistory) -> list[str]:
    """Return what was not read, is not a number or has no panel."""
    not_finite = {
        name: count
        for name in run.names()
        if (count := sum(not math.isfinite(value) for value in run.series(name).value))
    }
    said = list(run.notes)
    said += [f"{name}: {count} values are not finite, and not drawn" for name, count in not_finite.items()]
    if alone := uncovered(run.names()):
        said.append(f"no panel shows {', '.join(alone)}; series.csv has them")
    return said


def panels_without_data(names: Iterable[str]) -> list[str]:
    """Return the titles of panels that none of these metrics belongs to."""
    known = list(names)
    return [panel.title for section in SECTIONS for panel in section.panels if not charts(panel, known)]
