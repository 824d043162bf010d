"""Squared gradients by decile as panels."""

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tide_mega.diagnostics.propositions.measured_gradients import Measured, embeddings_before, ratios
from tide_mega.plotting.lines import Line, legend
from tide_mega.plotting.style import decile_axis, label, panels


def draw(memory: Sequence[Measured], base: Measured | None, looks: Mapping[str, Line]) -> Figure:
    """Squared gradients, pathways, ratios to embeddings, and steps, by decile; `looks` by label."""
    if not any(embeddings_before(one, base) for one in memory):
        base = None
    figure, axes = panels(2, 2, width=6.0, height=4.6)
    gradients, pathways, shares, steps = axes.flat
    for one in memory:
        look, blocks = looks[one.label], one.sums.num_blocks
        solid = {"marker": look.marker, "color": look.colour, "markersize": 5}
        x = [row.decile for row in one.deciles]
        gradients.plot(
            x, [_positive(row.total) for row in one.deciles], label=f"{one.label}, tables", **solid
        )
        gradients.plot(x, [_positive(row.smallest) for row in one.deciles], ":", color=look.colour)
        pathways.plot(x, [row.pathways for row in one.deciles], label=f"{one.label} (K = {blocks})", **solid)
        pathways.axhline(blocks, color=look.colour, linestyle=":", linewidth=1)
        own, against = ratios(one, base)
        shares.plot(x, own, **solid)
        if base is not None:
            shares.plot(x, against, "--", **solid, markerfacecolor="white")
    _generic(gradients, ":", "K x least table")
    _generic(pathways, ":", "K")
    _generic(shares, "o-", "to its own embedding")
    if base is not None:
        _generic(shares, "o--", f"to that of {base.label}")
        x = [row.decile for row in base.deciles]
        y = [_positive(row.embedding) for row in base.deciles]
        look = looks[base.label]
        gradients.plot(
            x, y, look.dash, marker=look.marker, color=look.colour, label=f"{base.label}, embedding"
        )
    first, look = memory[0].deciles, looks[memory[0].label]
    x = [row.decile for row in first]
    steps.plot(
        x, [_positive(row.steps_seen) for row in first], f"{look.marker}-", color=look.colour, label="seen"
    )
    expected = [_positive(row.steps_expected) for row in first]
    steps.plot(
        x,
        expected,
        f"{look.marker}--",
        color=look.colour,
        markerfacecolor="white",
        label="expected, κ of each step",
    )
    for axis in (gradients, shares, steps):
        axis.set_yscale("log")
        axis.margins(y=0.15)  # room for the names of the roles
    pathways.set_ylim(bottom=1, top=1.15 * max(one.sums.num_blocks for one in memory))
    titles = (
        (gradients, "Squared gradient of a type's rows", "sum over steps, mean over types (nats²)"),
        (pathways, "Pathways in effect", "all tables / strongest table (1 to K)"),
        (shares, "Tables against the input embedding", "squared gradient, ratio"),
        (steps, f"Steps with a type, of {memory[0].sums.steps}, {memory[0].label}", "mean over types"),
    )
    for axis, title, y_label in titles:
        decile_axis(axis, "token")
        label(axis, title, axis.get_xlabel(), y_label)
        legend(axis, inside=2 if axis is steps or axis is shares else 0)
    return figure


def _generic(axis: Axes, form: str, text: str) -> None:
    """Name what a kind of line means, whatever its colour."""
    axis.plot([], [], form, color="black", markerfacecolor="white" if form == "o--" else None, label=text)


def _positive(value: float) -> float:
    return value if value > 0 else math.nan
