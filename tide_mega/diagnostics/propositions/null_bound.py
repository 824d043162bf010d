"""Proposition 3.1: a null logit above s* makes the memory smaller than ε (paper, section 3.3.1, appendix E)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from tide_mega.diagnostics.analysis import Analysis, SkippedError
from tide_mega.diagnostics.propositions import memory_norms, routed_memory
from tide_mega.diagnostics.propositions.by_run import by_run
from tide_mega.diagnostics.propositions.memory_norms import NullBound
from tide_mega.diagnostics.propositions.routed_memory import RoutedMemory
from tide_mega.diagnostics.section import DataTable, Section
from tide_mega.model.canonical import GAINS, TABLES
from tide_mega.plotting.lines import Line, legend
from tide_mega.plotting.style import label, panels
from tide_mega.trained.run import StoredWeights

EPSILONS = (0.5, 0.1, 1e-2, 1e-3, 1e-6)
"""Parts of C that ε is set to."""
GRID = np.linspace(-4.0, 18.0, 23)
"""Other null logits that are tried, for the curve."""
SEQUENCES = 8
"""Held-out sequences that the routers are watched on."""

PAPER = (
    "For every ε > 0 there are finite router weights with which the memory is smaller than ε for every token "
    "and "
    "layer: with the other logits at 0, every null logit from s* = log(K (C - ε) / ε) on does it."
)


@dataclass(frozen=True)
class Checked:
    """One run: the bound at the s* of each ε, along a curve, and what its own routers do."""

    label: str
    at_thresholds: NullBound
    epsilons: tuple[float, ...]
    """ε itself, not as a part of C."""
    curve: NullBound
    routed: RoutedMemory


def check(
    chunks: memory_norms.Chunks, gains_KD: Tensor, norm_eps: float
) -> tuple[NullBound, NullBound, list[float]]:
    """Measure C, then the memory at the s* of each of `EPSILONS` and along `GRID`; return both and the ε.

    Raises:
        SkippedError: C is 0, or a row is not finite.
    """
    largest, num_blocks = memory_norms.largest_row(chunks, gains_KD, norm_eps), gains_KD.size(0)
    if not largest:
        raise SkippedError("it needs memory rows that are not 0: all gains are 0")
    epsilons = [part * largest for part in EPSILONS]
    thresholds = [memory_norms.threshold(largest, num_blocks, epsilon) for epsilon in epsilons]
    both = memory_norms.measure(chunks, gains_KD, norm_eps, largest, (*thresholds, *GRID.tolist()))
    split = len(thresholds)
    parts = [
        NullBound(num_blocks, largest, both.logits[part], both.largest_memory[part])
        for part in (slice(None, split), slice(split, None))
    ]
    return parts[0], parts[1], epsilons


def run(analysis: Analysis) -> Section:
    """Check it over the whole vocabulary of every run with memory; see `Section`."""
    results = []
    for one in analysis.with_memory:
        gains_KD = one.weights.tensor(GAINS)
        at_thresholds, curve, epsilons = check(
            partial(stored_rows, one.weights), gains_KD, one.config.model.norm_eps
        )
        rows = analysis.held_out_rows(one, SEQUENCES)
        routed = routed_memory.measure(analysis.model(one), rows, curve.largest_row)
        results.append(Checked(one.label, at_thresholds, tuple(epsilons), curve, routed))
    watched = by_run({one.label: f"{one.routed.tokens:,} held-out tokens" for one in results})
    return Section(
        paper=PAPER,
        findings=tuple(sentence for one in results for sentence in describe(one)),
        tables={"bound": bound_table(results), "layers": layer_table(results)},
        figures={"null_bound": draw(results, analysis.looks)},
        notes=(
            "The bound is a theorem about the softmax and the triangle inequality: that it holds checks the "
            "code and "
            "the stored rows, not the paper's experiments.",
            f"The routers are watched on {watched}. Their null logit stands here as the s "
            "with which logits of 0 for the blocks would give the mean null weight.",
        ),
    )


def stored_rows(weights: StoredWeights) -> Iterable[Tensor]:
    """Yield the stored rows of the tables, part by part."""
    for _, rows_UKD in weights.chunks(TABLES):
        yield rows_UKD


def describe(one: Checked) -> list[str]:
    """Say whether the bound holds, how far from tight it is, and where the trained routers are."""
    at, num_blocks = one.at_thresholds, one.curve.num_blocks
    wrong = [*at.violations, *one.curve.violations]
    parts = ", ".join(
        f"{epsilon / at.largest_row:.0e} C (s* = {s:.2f})"
        for epsilon, s in zip(one.epsilons, at.logits, strict=True)
    )
    if wrong:
        where = ", ".join(f"{s:.2f}" for s in wrong)
        first = (
            f"{one.label}: the bound does NOT hold at null logits {where}: the stored rows or the norm are "
            "wrong."
        )
    else:
        first = (
            f"{one.label} (K = {num_blocks}, C = {at.largest_row:.3f}): the memory of every token of the "
            "vocabulary is "
            f"at most ε at the s* of every ε tried: {parts}."
        )
    smallest = min(
        measured / epsilon for measured, epsilon in zip(at.largest_memory, one.epsilons, strict=True)
    )
    largest = max(
        measured / epsilon for measured, epsilon in zip(at.largest_memory, one.epsilons, strict=True)
    )
    used = f"{smallest:.1%}" if largest - smallest < 5e-4 else f"{smallest:.1%} to {largest:.1%}"
    second = f"{one.label}: the largest memory of any token is {used} of ε there"
    if smallest < 1 - 5e-4:
        second += (
            f"; for all of ε a token's {num_blocks} rows would have to point the same way, each as long as the "
            "longest"
        )
    second += "."
    routed, tokens = one.routed, one.routed.tokens
    layer_parts = (routed.part_L / tokens).tolist()
    least, most = (layer_parts.index(of(layer_parts)) for of in (min, max))
    logits = [routed.null_logit(i, num_blocks) for i in range(len(layer_parts))]
    third = (
        f"{one.label}: with the trained routers the memory's norm is on average {layer_parts[least]:.1%} "
        "(layer "
        f"{least}) to {layer_parts[most]:.1%} (layer {most}) "
        f"of the hidden state's; their null logits correspond to s from {min(logits):.2f} to "
        f"{max(logits):.2f}. "
    )
    third += (
        "For no token and layer is the memory larger than (1 - null weight) C; it comes to "
        f"{routed.tightest:.1%} of it."
        if routed.holds
        else f"The memory exceeds (1 - null weight) C, {routed.tightest:.3f} times: the rows read are not "
        "those stored."
    )
    return [first, second, third]


def bound_table(results: list[Checked]) -> DataTable:
    """Every null logit that was tried."""
    columns = (
        "run",
        "memory blocks K",
        "C",
        "ε",
        "null logit s",
        "largest memory norm",
        "bound",
        "used (%)",
        "holds",
    )
    rows = []
    for one in results:
        for of, epsilons in ((one.at_thresholds, one.epsilons), (one.curve, [None] * len(one.curve.logits))):
            for epsilon, s, measured, most in zip(
                epsilons, of.logits, of.largest_memory, of.bounds, strict=True
            ):
                holds = s not in of.violations
                used = 100 * measured / most
                rows.append(
                    (one.label, of.num_blocks, of.largest_row, epsilon, s, measured, most, used, holds)
                )
    return DataTable.of(columns, rows)


def layer_table(results: list[Checked]) -> DataTable:
    """What the trained routers inject."""
    columns = (
        *("run", "layer", "mean memory norm", "mean memory norm / hidden norm (%)"),
        *("mean null weight (0 to 1)", "null logit s that gives it"),
    )
    rows = []
    for one in results:
        routed, tokens = one.routed, one.routed.tokens
        for i in range(len(routed.memory_L)):
            means = [float(of[i]) / tokens for of in (routed.memory_L, routed.part_L, routed.null_L)]
            s = routed.null_logit(i, one.curve.num_blocks)
            rows.append((one.label, i, means[0], 100 * means[1], means[2], s))
    return DataTable.of(columns, rows)


def draw(results: list[Checked], looks: Mapping[str, Line]) -> Figure:
    """Largest memory against the null logit with its bound; the trained routers' memory by layer."""
    figure, axes = panels(2, width=6.0, height=4.6)
    for one in results:
        look = looks[one.label]
        _draw_bound(axes[0, 0], one, look)
        parts = 100 * one.routed.part_L / one.routed.tokens
        axes[0, 1].plot(
            range(len(parts)), parts, f"{look.marker}-", color=look.colour, label=one.label, markersize=5
        )
    axes[0, 0].plot([], [], ":", color="black", label="bound K / (K + e^s)")
    axes[0, 0].plot([], [], "o", color="black", markerfacecolor="white", label="ε at its s*")
    axes[0, 0].set_yscale("log")
    label(
        axes[0, 0],
        "Memory under a null logit",
        "null logit s (others 0)",
        "largest memory norm / C, any token",
    )
    legend(axes[0, 0], inside=8, place="lower left", size=8)
    label(
        axes[0, 1], "Memory that the trained routers inject", "layer", "mean norm / hidden state's norm (%)"
    )
    axes[0, 1].set_ylim(bottom=0)
    axes[0, 1].xaxis.get_major_locator().set_params(integer=True)
    legend(axes[0, 1], inside=6)
    return figure


def _draw_bound(axis: Axes, one: Checked, look: Line) -> None:
    scale = one.curve.largest_row
    name = f"{one.label} (K = {one.curve.num_blocks})"
    axis.plot(one.curve.logits, [most / scale for most in one.curve.bounds], ":", color=look.colour)
    axis.plot(
        one.curve.logits, [m / scale for m in one.curve.largest_memory], "-", color=look.colour, label=name
    )
    shares = [epsilon / scale for epsilon in one.epsilons]
    axis.plot(
        one.at_thresholds.logits, shares, look.marker, color=look.colour, markerfacecolor="white", zorder=3
    )
