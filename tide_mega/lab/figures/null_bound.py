"""Proposition 3.1: a null logit above s* makes the memory smaller than ε (paper, section 3.3.1, appendix E).

Checks the bound on the rows of the whole vocabulary, in chunks, and measures how much memory the trained routers
inject at each layer.

Shapes: V vocabulary, U rows of a chunk or distinct token types, B sequences, T tokens, L layers, K blocks, J = K +
1, D width, N logits tried.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from tide_mega.kernels.row_norm import row_norm
from tide_mega.lab.figures.analysis import Analysis, SkippedError
from tide_mega.lab.figures.kit import by_run, table_names
from tide_mega.lab.figures.section import DataTable, Section
from tide_mega.lab.plotting import Line, label, legend, panels
from tide_mega.model.canonical import GAINS, TABLES
from tide_mega.trained.model import TrainedModel
from tide_mega.trained.run import StoredWeights

Chunks = Callable[[], Iterable[Tensor]]
"""Starts a pass over the stored rows E [U, K, D], one part of the vocabulary after the other."""

TOLERANCE = 1e-12
"""Relative, for intermediate float64 arithmetic."""

_MIXED_ELEMENTS = 2**21


@dataclass(frozen=True)
class NullBound:
    """The remaining memory when the null logit is s and the other logits are 0 (paper, E.1 to E.3)."""

    num_blocks: int
    largest_row: float
    """C, the largest norm of M_k(v) over tokens and blocks, or the value claimed for it."""
    logits: tuple[float, ...]
    """s."""
    largest_memory: tuple[float, ...]
    """Largest norm of m(v) over tokens, for each s."""

    @property
    def bounds(self) -> list[float]:
        """K C / (K + e^s)."""
        return [bound(self.largest_row, self.num_blocks, s) for s in self.logits]

    @property
    def violations(self) -> list[float]:
        """Logits at which a token's memory exceeds the bound or is NaN."""
        triples = zip(self.logits, self.largest_memory, self.bounds, strict=True)
        return [s for s, measured, most in triples if not measured <= most * (1 + TOLERANCE)]


def bound(largest_row: float, num_blocks: int, null_logit: float) -> float:
    """Return K C / (K + e^s)."""
    return num_blocks * largest_row / (num_blocks + math.exp(null_logit))


def threshold(largest_row: float, num_blocks: int, epsilon: float) -> float:
    """Return s* = log(K (C - ε) / ε), at which the bound is ε (paper, E.3).

    Raises:
        ValueError: ε is not between 0 and C.
    """
    if not 0 < epsilon < largest_row:
        raise ValueError(f"ε = {epsilon:g} is not between 0 and C = {largest_row:g}")
    return math.log(num_blocks * (largest_row - epsilon) / epsilon)


def largest_row(chunks: Chunks, gains_KD: Tensor, norm_eps: float) -> float:
    """Return C, the largest norm of M_k(v) over the vocabulary.

    Raises:
        SkippedError: a row or a gain is not finite.
    """
    is_wrong_K = ~gains_KD.isfinite().all(1)
    if is_wrong_K.any():
        table = _table(int(is_wrong_K.nonzero()[0]))
        raise SkippedError(f"the gain of {table} is not finite: look at an earlier checkpoint")
    largest, first = 0.0, 0
    for rows_UKD in chunks():
        norm_UK = _norm(rows_UKD, gains_KD, norm_eps).norm(dim=-1)
        # Checked per chunk: Python's max drops a NaN.
        if not norm_UK.isfinite().all():
            u, k = (~norm_UK.isfinite()).nonzero()[0].tolist()
            raise SkippedError(f"row {first + u} of {_table(k)} is not finite: look at an earlier checkpoint")
        largest, first = max(largest, float(norm_UK.max())), first + len(rows_UKD)
    return largest


def measure_bound(
    chunks: Chunks, gains_KD: Tensor, norm_eps: float, largest: float, logits: Iterable[float]
) -> NullBound:
    """Mix the rows of every token by the router's softmax of (0, ..., 0, s); `largest` is C."""
    num_blocks = gains_KD.size(0)
    logits = tuple(logits)
    logits_NJ = torch.zeros(len(logits), num_blocks + 1, dtype=torch.float64)
    logits_NJ[:, -1] = torch.tensor(logits, dtype=torch.float64)
    alpha_NK = logits_NJ.softmax(-1)[:, :-1]
    most_N = torch.zeros(len(logits), dtype=torch.float64)
    at_a_time = max(1, _MIXED_ELEMENTS // (len(logits) * gains_KD.size(1)))
    for chunk_UKD in chunks():
        for rows_UKD in chunk_UKD.split(at_a_time):
            mixed_UND = alpha_NK @ _norm(rows_UKD, gains_KD, norm_eps)
            most_N = torch.maximum(most_N, mixed_UND.norm(dim=-1).amax(0))
    return NullBound(num_blocks, largest, logits, tuple(most_N.tolist()))


def _table(k: int) -> str:
    return table_names(k + 1)[-1]


def _norm(rows_UKD: Tensor, gains_KD: Tensor, norm_eps: float) -> Tensor:
    """Norms of M: M in fp32, as the model computes it; the rest in fp64."""
    return row_norm("naive", rows_UKD.float(), gains_KD.float(), norm_eps).double()


TOLERANCES = {"fp32": 1e-5, "bf16": 1e-2}
"""Relative, for rows and sums in a precision."""


@dataclass
class RoutedMemory:
    """Means over tokens, for each layer; filled by `add`."""

    tolerance: float = TOLERANCES["fp32"]
    tokens: int = 0
    memory_L: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    """Sum of the norm of m_l."""
    part_L: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    """Sum of the norm of m_l over that of h_l."""
    null_L: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    """Sum of the null bank's weight."""
    tightest: float = 0.0
    """The largest norm of m_l over (1 - null weight) C, of any token and layer (E.1 says at most 1)."""

    def add(self, alpha_LBTJ: Tensor, hidden_LBTD: Tensor, memory_BTKD: Tensor, largest_row: float) -> None:
        """Add tokens: router weights, hidden states after each layer, normalised rows, and C.

        Raises:
            SkippedError: hidden states or what a layer injects are not finite.
        """
        layers = alpha_LBTJ.size(0)
        if not self.tokens:
            self.memory_L, self.part_L, self.null_L = (
                torch.zeros(layers, dtype=torch.float64) for _ in range(3)
            )
        self.tokens += alpha_LBTJ[0, ..., 0].numel()
        for i in range(layers):
            injected_BTD = torch.einsum("btk,btkd->btd", alpha_LBTJ[i, ..., :-1].float(), memory_BTKD)
            norm_BT = injected_BTD.norm(dim=-1).double()
            hidden_BT = hidden_LBTD[i].norm(dim=-1).double()
            # The comparisons below would miss a NaN.
            if not (norm_BT + hidden_BT).isfinite().all():
                raise SkippedError(
                    f"memory or hidden states of layer {i} are not finite: look at an earlier checkpoint"
                )
            null_BT = alpha_LBTJ[i, ..., -1].double()
            self.memory_L[i] += norm_BT.sum().cpu()
            self.part_L[i] += (norm_BT / hidden_BT).sum().cpu()
            self.null_L[i] += null_BT.sum().cpu()
            # From the blocks' weights: 1 - null would cancel where the null bank has nearly all the weight.
            most_BT = alpha_LBTJ[i, ..., :-1].double().sum(-1) * largest_row
            used_BT = torch.where(most_BT > 0, norm_BT / most_BT, 0.0)
            self.tightest = max(self.tightest, float(used_BT.max()))

    @property
    def holds(self) -> bool:
        """Whether no token's memory is larger than (1 - null weight) C."""
        return self.tightest <= 1 + self.tolerance

    def null_logit(self, layer: int, num_blocks: int) -> float:
        """Return the s at which K / (K + e^s) is the mean weight left to the blocks (E.2)."""
        null = float(self.null_L[layer]) / self.tokens
        if not 0 < null < 1:
            return math.copysign(math.inf, null - 0.5)
        return math.log(num_blocks * null / (1 - null))


@torch.no_grad()
def measure_routed(model: TrainedModel, sequences: Iterable[Tensor], largest_row: float) -> RoutedMemory:
    """Run sequences [T] one by one; `largest_row` is C."""
    found = RoutedMemory(TOLERANCES[model.config.trainer.precision])
    for tokens_T in sequences:
        tokens_BT = tokens_T[None].to(model.device.torch_device)
        inside = model.look_inside(tokens_BT)
        if inside.alpha_LBTJ is None:
            raise ValueError(f"{model.run.label} has no routers: it has no memory")
        ids_U, index_BT = torch.unique(tokens_BT, return_inverse=True)
        memory_UKD = normalised_rows(model, ids_U)
        found.add(inside.alpha_LBTJ, inside.hidden_LBTD, memory_UKD[index_BT], largest_row)
    return found


@torch.no_grad()
def normalised_rows(model: TrainedModel, ids_U: Tensor) -> Tensor:
    """Return M [U, K, D] of distinct, ascending ids, as the model's layers receive them; fp32."""
    return model.normalised(model.table_rows(ids_U)).float()


EPSILONS = (0.5, 0.1, 1e-2, 1e-3, 1e-6)
"""Values of ε, as fractions of C."""
GRID = np.linspace(-4.0, 18.0, 23)
"""Further null logits, for the curve."""
SEQUENCES = 8
"""Held-out sequences on which the routers are measured."""

PAPER = (
    "For every ε > 0 there are finite router weights with which the memory is smaller than ε for every token "
    "and "
    "layer: with the other logits at 0, every null logit from s* = log(K (C - ε) / ε) on does it."
)


@dataclass(frozen=True)
class Checked:
    """One run: the bound at the s* of each ε and along a curve, and what its trained routers do."""

    label: str
    at_thresholds: NullBound
    epsilons: tuple[float, ...]
    """ε itself, not relative to C."""
    curve: NullBound
    routed: RoutedMemory


def check(chunks: Chunks, gains_KD: Tensor, norm_eps: float) -> tuple[NullBound, NullBound, list[float]]:
    """Measure C, then the memory at the s* of each of `EPSILONS` and along `GRID`; return both and the ε.

    Raises:
        SkippedError: C is 0, or a row is not finite.
    """
    largest, num_blocks = largest_row(chunks, gains_KD, norm_eps), gains_KD.size(0)
    if not largest:
        raise SkippedError("it needs memory rows that are not 0: all gains are 0")
    epsilons = [part * largest for part in EPSILONS]
    thresholds = [threshold(largest, num_blocks, epsilon) for epsilon in epsilons]
    both = measure_bound(chunks, gains_KD, norm_eps, largest, (*thresholds, *GRID.tolist()))
    split = len(thresholds)
    parts = [
        NullBound(num_blocks, largest, both.logits[part], both.largest_memory[part])
        for part in (slice(None, split), slice(split, None))
    ]
    return parts[0], parts[1], epsilons


def run(analysis: Analysis) -> Section:
    """Check the bound over the whole vocabulary of every run with memory; see `Section`."""
    results = []
    for one in analysis.with_memory:
        gains_KD = one.weights.tensor(GAINS)
        at_thresholds, curve, epsilons = check(
            partial(stored_rows, one.weights), gains_KD, one.config.model.norm_eps
        )
        rows = analysis.held_out_rows(one, SEQUENCES)
        routed = measure_routed(analysis.model(one), rows, curve.largest_row)
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
    """Say whether the bound holds, how tight it is, and where the trained routers are."""
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
    """Every null logit tried."""
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
    """The memory that the trained routers inject, by layer."""
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
    """Draw the largest memory against the null logit with its bound, and the trained routers' memory by layer."""
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
