"""l2 norms of embedding rows by frequency, and how they grow during training (paper, Figure 1).

Shows the mean norm of each decile and its trend over the deciles, the distribution of norms, and the growth from
checkpoint to checkpoint; the norms of the memory's tables, from the last checkpoint, are shown beside the
embedding's.

Shapes: V vocabulary, K blocks, C checkpoints, F frequency deciles.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tide_mega.data.frequency import NUM_BINS
from tide_mega.lab.figures.analysis import Analysis, SkippedError
from tide_mega.lab.figures.kit import (
    DECILE_SLOTS,
    EMBEDDING,
    ROLE_OF,
    by_role,
    by_slot,
    row_norms,
    table_names,
)
from tide_mega.lab.figures.section import Cell, DataTable, Section
from tide_mega.lab.plotting import HEAT, MARKERS, PALETTE, decile_axis, label, lines, panel_grid, panels
from tide_mega.model.canonical import TABLES
from tide_mega.trained.run import StoredWeights, TrainedRun


@dataclass(frozen=True)
class SlotNorms:
    """l2 norms of a slot's types; None for a slot without types."""

    types: int
    mean: float | None
    std: float | None
    """Over the types."""


def measure_norms(norms_V: NDArray[np.floating], bins_V: NDArray[np.integer]) -> dict[str, SlotNorms]:
    """Summarise the norms of every slot's types."""
    found = {}
    for slot, ids in by_slot(bins_V).items():
        norms = norms_V[ids].astype(np.float64)
        mean, std = (float(norms.mean()), float(norms.std())) if len(ids) else (None, None)
        found[slot] = SlotNorms(len(ids), mean, std)
    return found


def decile_means(norms_V: NDArray[np.floating], bins_V: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return the mean norm of each decile [F], or of [V, K] norms [F, K]; NaN for a decile without a type."""
    means = np.full((NUM_BINS, *norms_V.shape[1:]), np.nan)
    for b in range(NUM_BINS):
        if (bins_V == b).any():
            means[b] = norms_V[bins_V == b].astype(np.float64).mean(0)
    return means


@dataclass(frozen=True)
class Order:
    """Trend of values from the rarest decile to the commonest."""

    rises: int
    falls: int
    steps: int
    """Neighbouring pairs."""
    spearman: float | None
    """Rank correlation with the decile; None without two different values."""

    @property
    def verb(self) -> str:
        """The trend in words."""
        if self.steps and self.steps in (self.rises, self.falls):
            return "rises monotonically" if self.rises else "falls monotonically"
        return "neither rises nor falls monotonically"

    def __str__(self) -> str:
        correlation = "" if self.spearman is None else f", Spearman {self.spearman:+.2f}"
        return f"{self.rises} of {self.steps} steps rise{correlation}"


def measure_order(values_F: NDArray[np.floating]) -> Order:
    """Measure the trend of values along their index, NaN left out."""
    known = values_F[np.isfinite(values_F)]
    steps = np.diff(known)
    _, place, times = np.unique(known, return_inverse=True, return_counts=True)
    rank = (np.cumsum(times) - (times - 1) / 2)[place]  # the mean rank of equal values
    spearman = float(np.corrcoef(rank, np.arange(len(known)))[0, 1]) if len(times) > 1 else None
    return Order(int((steps > 0).sum()), int((steps < 0).sum()), len(steps), spearman)


@dataclass(frozen=True)
class Growth:
    """Mean norms at consecutive checkpoints, and their change per `unit` of training tokens."""

    tokens_C: tuple[int, ...]
    """Training tokens at each checkpoint, ascending."""
    mean_CF: NDArray[np.float64]

    def __post_init__(self) -> None:
        if any(later <= earlier for earlier, later in pairwise(self.tokens_C)):
            raise ValueError(f"checkpoints must ascend in training tokens, not {list(self.tokens_C)}")

    @property
    def intervals(self) -> int:
        """Pairs of consecutive checkpoints."""
        return max(0, len(self.tokens_C) - 1)

    @property
    def unit(self) -> int:
        """Tokens that `rate_CF` is per."""
        return 10**9 if self.tokens_C[-1] >= 10**9 else 10**6

    @property
    def unit_name(self) -> str:
        """`unit` in words."""
        return "billion" if self.unit == 10**9 else "million"

    @property
    def rate_CF(self) -> NDArray[np.float64]:
        """Change of each decile's mean norm per `unit` tokens [C - 1, F]."""
        passed_C = np.diff(np.asarray(self.tokens_C, np.float64))
        return np.diff(self.mean_CF, axis=0) / passed_C[:, None] * self.unit

    def thinned(self, intervals: int) -> "Growth":
        """Leave out checkpoints, evenly, until at most `intervals` remain."""
        if self.intervals <= intervals:
            return self
        kept = np.linspace(0, self.intervals, intervals + 1).round().astype(int)
        return Growth(tuple(self.tokens_C[i] for i in kept), self.mean_CF[kept])


HISTOGRAM_BINS = 50


@dataclass(frozen=True)
class RunNorms:
    """The norms in a run's checkpoints."""

    label: str
    num_blocks: int
    embedding: dict[str, SlotNorms]
    """By slot."""
    order: Order
    tables_FK: NDArray[np.float64] | None
    """Mean norm of each memory table's rows; None without memory."""
    edges: NDArray[np.float64]
    """Of the histogram's bins."""
    density: dict[str, NDArray[np.float64]]
    """Of the norms of rare, mid and common types; unit: 1 / norm."""
    growth: Growth
    initial: float
    """Expected norm of rows at initialisation."""

    @property
    def means_F(self) -> NDArray[np.float64]:
        """Mean norm of each decile, NaN for one without types."""
        return np.array([self.embedding[slot].mean for slot in DECILE_SLOTS], np.float64)


def densities(
    norms_V: NDArray[np.floating], bins_V: NDArray[np.integer]
) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    """Return histogram edges over the types of all deciles, and the densities of rare, mid and common."""
    roles = by_role(bins_V)
    of_deciles = np.concatenate([norms_V[ids] for ids in roles.values()]).astype(np.float64)
    edges = np.histogram_bin_edges(of_deciles, HISTOGRAM_BINS)
    density = {}
    for role, ids in roles.items():
        counts, _ = np.histogram(norms_V[ids], edges)
        density[role] = counts / max(1, counts.sum()) / np.diff(edges)
    return edges, density


def measure_run(run: TrainedRun) -> RunNorms:
    """Read every checkpoint's embedding and the last one's tables, chunk by chunk.

    Raises:
        SkippedError: the norm of a row is not finite.
    """
    history = [weights for weights in run.history if weights.step < run.step]
    means = [decile_means(_norms(run, weights, EMBEDDING), run.bins) for weights in history]
    norms_V = _norms(run, run.weights, EMBEDDING)
    means.append(decile_means(norms_V, run.bins))
    tokens = [run.tokens_at(weights) for weights in [*history, run.weights]]
    tables_FK = None
    if run.num_blocks:
        tables_FK = decile_means(_norms(run, run.weights, TABLES), run.bins)
    edges, density = densities(norms_V, run.bins)
    model = run.config.model
    return RunNorms(
        label=run.label,
        num_blocks=run.num_blocks,
        embedding=measure_norms(norms_V, run.bins),
        order=measure_order(means[-1]),
        tables_FK=tables_FK,
        edges=edges,
        density=density,
        growth=Growth(tuple(tokens), np.stack(means)),
        initial=model.init_std * model.hidden_size**0.5,
    )


def _norms(run: TrainedRun, weights: StoredWeights, name: str) -> NDArray[np.float32]:
    """Return the norms of a weight's rows, [V] or [V, K], none of which is NaN or infinite."""
    norms = row_norms(weights.chunks(name))
    if not np.isfinite(norms).all():
        v, *k = np.argwhere(~np.isfinite(norms))[0].tolist()
        table = table_names(k[0] + 1)[-1] if k else "E"
        raise SkippedError(
            f"the norm of row {v} of {table} is not finite at step {weights.step} of {run.label}: look at an "
            "earlier checkpoint"
        )
    return norms


MOST_INTERVALS = 8
"""Between checkpoints, per panel."""


def draw_means(runs: Sequence[RunNorms]) -> Figure:
    """Draw the mean norm per decile of the input embedding and of the memory's tables, if any."""
    with_memory = [run for run in runs if run.tables_FK is not None]
    figure, axes = panels(2 if with_memory else 1)
    x = np.arange(NUM_BINS)
    for run, look in zip(runs, lines([run.num_blocks for run in runs]), strict=True):
        form = f"{look.marker}{look.dash}"
        axes[0, 0].plot(x, run.means_F, form, color=look.colour, label=run.label)
        if run.tables_FK is not None:
            low, high, mean = (of(run.tables_FK, axis=1) for of in (np.min, np.max, np.mean))
            name = f"{run.label}, mean and range of {run.tables_FK.shape[1]} blocks"
            axes[0, 1].plot(x, mean, form, color=look.colour, label=name)
            axes[0, 1].fill_between(x, low, high, color=look.colour, alpha=0.25, linewidth=0)
    titles = ("Input embedding E", "Memory tables Eₖ")
    for axis, title in zip(axes[0], titles, strict=False):
        axis.margins(y=0.15)
        label(axis, title, "", "mean l2 norm of rows")
        decile_axis(axis)
        axis.legend(frameon=False, fontsize=8)
    return figure


def draw_distributions(runs: Sequence[RunNorms]) -> Figure:
    """Draw the density of the input embedding's norms, rare against common types; one panel per run."""
    figure, flat = panel_grid(len(runs))
    for axis, run in zip(flat, runs, strict=True):
        for role, colour, line in (("rare", PALETTE[1], "-"), ("common", PALETTE[0], "--")):
            density = run.density[role]
            axis.stairs(density, run.edges, fill=True, color=colour, alpha=0.3)
            axis.stairs(
                density, run.edges, color=colour, linestyle=line, linewidth=1.6, label=f"{role} types"
            )
        axis.margins(y=0.1)
        label(axis, f"Norms of E, {run.label}", "l2 norm of a row", "density (1 / norm)")
        axis.legend(frameon=False)
    return figure


def draw_growth(runs: Sequence[RunNorms]) -> Figure:
    """Draw the change of the mean norm between checkpoints by decile, early intervals dark; one panel per run."""
    figure, flat = panel_grid(len(runs))
    heat = ListedColormap(matplotlib.colormaps[HEAT](np.linspace(0, 0.9, 256)))
    for axis, run in zip(flat, runs, strict=True):
        growth = run.growth.thinned(MOST_INTERVALS)
        ends = np.array(growth.tokens_C[1:]) / growth.unit
        scale = Normalize(growth.tokens_C[0] / growth.unit, ends[-1])
        for i, (rate_F, end) in enumerate(zip(growth.rate_CF, ends, strict=True)):
            marker = MARKERS[i % len(MARKERS)]
            axis.plot(np.arange(NUM_BINS), rate_F, f"{marker}-", color=heat(scale(end)), markersize=4)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.margins(y=0.12)
        label(
            axis,
            f"Growth of E's norms, {run.label}",
            "",
            f"change of mean l2 norm per {growth.unit_name} tokens",
        )
        decile_axis(axis)
        bar = figure.colorbar(ScalarMappable(scale, heat), ax=axis)
        bar.set_label(f"end of the interval ({growth.unit_name} training tokens)")
    return figure


def run(analysis: Analysis) -> Section:
    """Show norms per decile, their distributions and their growth, for every run."""
    found = [measure_run(of) for of in analysis.runs]
    figures = {"means": draw_means(found), "distributions": draw_distributions(found)}
    tables = {"means": _means_table(found), "distributions": _distributions_table(found)}
    if grown := [of for of in found if of.growth.intervals]:
        figures["growth"] = draw_growth(grown)
        tables["growth"] = _growth_table(grown)
    if with_memory := [of for of in found if of.tables_FK is not None]:
        tables["memory_tables"] = _memory_table(with_memory)
    return Section(
        paper="The base model's mean norm rises from the rarest decile to the commonest; rare rows are "
        "spread widely, common ones narrowly; and with training rare norms decline while common ones keep "
        "growing.",
        findings=tuple(sentence for of in found for sentence in _findings(of)),
        tables=tables,
        figures=figures,
        notes=_notes(analysis, found),
    )


def _findings(of: RunNorms) -> list[str]:
    filled = np.flatnonzero(np.isfinite(of.means_F))
    if not len(filled):
        return [f"{of.label}: no type lies in a decile."]
    rarest, commonest = filled[[0, -1]]
    lines = [
        f"{of.label}: the mean norm of E's rows {of.order.verb} with frequency, from {of.means_F[rarest]:.3f} in "
        f"the rarest decile to {of.means_F[commonest]:.3f} in the commonest ({of.order}); rows start at about "
        f"{of.initial:.3f}."
    ]
    if of.growth.intervals:
        lines.append(describe_growth(of, rarest, commonest))
    if of.tables_FK is not None:
        mean_F = of.tables_FK.mean(1)
        low, high = (
            f"{mean_F[b]:.3f} ({of.tables_FK[b].min():.3f} to {of.tables_FK[b].max():.3f})"
            for b in (rarest, commonest)
        )
        order = measure_order(mean_F)
        lines.append(
            f"{of.label}: the mean norm of the {of.tables_FK.shape[1]} memory tables' rows {order.verb}, from "
            f"{low} to {high}, in brackets the range over blocks ({order})."
        )
    return lines


def describe_growth(of: RunNorms, rarest: int, commonest: int) -> str:
    """Say how two deciles' mean norms changed in the first and in the last interval."""
    first_F, last_F = of.growth.rate_CF[0], of.growth.rate_CF[-1]
    rare, common = f"{first_F[rarest]:+.3g}", f"{first_F[commonest]:+.3g}"
    if of.growth.intervals > 1:
        rare += f" between the first two checkpoints and {last_F[rarest]:+.3g} between the last two"
        common += f" and {last_F[commonest]:+.3g}"
    else:
        rare += " between the two checkpoints"
    return (
        f"{of.label}: per {of.growth.unit_name} tokens the rarest decile's mean norm changed by {rare}, the "
        f"commonest's by {common}."
    )


def _means_table(found: Sequence[RunNorms]) -> DataTable:
    columns = ("run", "decile", "role", "types", "mean norm of E's rows (l2)", "standard deviation (l2)")
    rows = [
        (of.label, slot, ROLE_OF.get(slot, ""), norms.types, norms.mean, norms.std)
        for of in found
        for slot, norms in of.embedding.items()
    ]
    return DataTable.of(columns, rows)


def _memory_table(found: Sequence[RunNorms]) -> DataTable:
    columns = ("run", "block", "decile", "mean norm of E_k's rows (l2)")
    rows = [
        (of.label, k + 1, slot, _cell(of.tables_FK[b, k]))
        for of in found
        if of.tables_FK is not None
        for k in range(of.tables_FK.shape[1])
        for b, slot in enumerate(DECILE_SLOTS)
    ]
    return DataTable.of(columns, rows)


def _distributions_table(found: Sequence[RunNorms]) -> DataTable:
    columns = ("run", "from norm (l2)", "to norm (l2)", *(f"{role} (density)" for role in found[0].density))
    rows: list[tuple[Cell, ...]] = [
        (of.label, float(low), float(high), *(float(density[i]) for density in of.density.values()))
        for of in found
        for i, (low, high) in enumerate(zip(of.edges[:-1], of.edges[1:], strict=True))
    ]
    return DataTable.of(columns, rows)


def _growth_table(found: Sequence[RunNorms]) -> DataTable:
    columns = ("run", "from (tokens)", "to (tokens)", "decile", "change of mean norm", "per (tokens)")
    rows: list[tuple[Cell, ...]] = []
    for of in found:
        spans = zip(of.growth.tokens_C[:-1], of.growth.tokens_C[1:], of.growth.rate_CF, strict=True)
        for first, last, rate_F in spans:
            rows += [
                (of.label, first, last, slot, _cell(rate), of.growth.unit)
                for slot, rate in zip(DECILE_SLOTS, rate_F, strict=True)
            ]
    return DataTable.of(columns, rows)


def _cell(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _notes(analysis: Analysis, found: Sequence[RunNorms]) -> tuple[str, ...]:
    notes = ["Types outside the deciles (dropped, unseen) are listed in the table and are in no decile."]
    if single := [of.label for of in found if not of.growth.intervals]:
        notes.append(
            f"{', '.join(single)}: growth needs two checkpoints (checkpoint.keep_every keeps them), and "
            "there is one."
        )
    if any(of.growth.intervals > MOST_INTERVALS for of in found):
        notes.append(
            f"The figure of growth joins neighbouring checkpoints to {MOST_INTERVALS} intervals; the table "
            "has all."
        )
    if tied := [of.label for of in analysis.runs if of.config.model.tie_embeddings]:
        notes.append(
            f"{', '.join(tied)}: the input embedding is the output layer too, so its rows also get the output's "
            "gradients, in every step. These push rows of types that seldom occur away from the hidden "
            "states and can make their norms the largest; rows of the memory's tables get the input's "
            "gradients alone."
        )
    return tuple(notes)
