"""Mean cosine distances between the input embedding and the memory's tables (paper, Figure 9).

A distance is taken between the rows that two tables hold for the same token type.

Shapes: N rows of a chunk, V vocabulary, D width, A tables.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from tide_mega.data.frequency import BIN_GROUPS
from tide_mega.lab.figures.analysis import Analysis
from tide_mega.lab.figures.kit import (
    by_role,
    by_slot,
    file_names,
    gains_note,
    occurring,
    side_by_side,
    table_names,
    to_unit,
)
from tide_mega.lab.figures.section import Cell, DataTable, Section
from tide_mega.lab.plotting import HEAT, MARKERS, SUBSCRIPTS, colours, label, panel_grid, panels
from tide_mega.trained.run import TrainedRun


@dataclass(frozen=True)
class Distances:
    """Mean cosine distances of groups of token types."""

    types: dict[str, int]
    """In each group."""
    mean_AA: dict[str, NDArray[np.float64]]
    """Mean over a group's types of 1 - cos, 0 to 2; NaN for a group without types."""
    zeros_A: tuple[int, ...]
    """Zero rows among all types; their cosine with any row counts as 0."""


def measure_distances(
    chunks: Iterable[tuple[int, Tensor]], groups: Mapping[str, NDArray[np.integer]]
) -> Distances:
    """Compare every pair of tables in one pass.

    Args:
        chunks: (first row, rows [N, A, D]) of the tables side by side, ascending; overwritten.
        groups: ids of each group's types; groups may overlap.

    Raises:
        SkippedError: a row is not finite.
    """
    sums: dict[str, Tensor] = {}
    zeros_A: Tensor | None = None
    for first, rows_NAD in chunks:
        unit_NAD = to_unit(rows_NAD, range(first, first + len(rows_NAD)))
        cosine_NAA = unit_NAD @ unit_NAD.transpose(1, 2)
        of_chunk_A = (cosine_NAA.diagonal(dim1=1, dim2=2) == 0).sum(0)
        zeros_A = of_chunk_A if zeros_A is None else zeros_A + of_chunk_A
        for name, ids in groups.items():
            here = ids[(ids >= first) & (ids < first + len(unit_NAD))] - first
            sum_AA = cosine_NAA[torch.from_numpy(here)].sum(0, dtype=torch.float64)
            sums[name] = sums[name] + sum_AA if name in sums else sum_AA
    if zeros_A is None:
        raise ValueError("there are no rows to compare")
    return Distances(
        types={name: len(ids) for name, ids in groups.items()},
        mean_AA={name: _distance(sums[name], len(ids)) for name, ids in groups.items()},
        zeros_A=tuple(zeros_A.tolist()),
    )


def _distance(cosine_sum_AA: Tensor, types: int) -> NDArray[np.float64]:
    if not types:
        return np.full(cosine_sum_AA.shape, np.nan)
    distance_AA = 1 - cosine_sum_AA.numpy() / types
    np.fill_diagonal(distance_AA, 0.0)  # of a table to itself, zero rows included
    return distance_AA


ALL = "all that occur"


def groups_of(bins_V: NDArray[np.integer]) -> dict[str, NDArray[np.intp]]:
    """Return the ids of the groups compared: rare, mid, common, those of no decile, and all that occur."""
    slots = by_slot(bins_V)
    outside = {slot: slots[slot] for slot in ("dropped", "unseen")}
    return {**by_role(bins_V), **outside, ALL: np.flatnonzero(occurring(bins_V))}


def run(analysis: Analysis) -> Section:
    """Compare the tables of every run with memory."""
    runs = analysis.with_memory
    found = {of.label: measure_distances(side_by_side(of.weights), groups_of(of.bins)) for of in runs}
    files = file_names(found)
    figures = {f"heat_map_{files[name]}": draw_heat_map(name, of.mean_AA[ALL]) for name, of in found.items()}
    figures["to_embedding"] = draw_to_embedding(found)
    return Section(
        paper="In TIDE-8E-1B every table is far from E (mean cosine distance 0.65 to 0.99), and the tables "
        "are closer to each other than to E without being the same.",
        findings=tuple(_finding(name, of) for name, of in found.items()),
        tables={"pairs": _pairs_table(found), "to_embedding": _groups_table(found)},
        figures=figures,
        notes=_notes(runs, found),
    )


def draw_heat_map(name: str, mean_AA: NDArray[np.float64]) -> Figure:
    """Draw all pairs of tables as a heat map with numbers."""
    A = len(mean_AA)
    side = max(4.6, 0.44 * A + 1.4)
    figure, axes = panels(1, width=side + 0.9, height=side)
    axis = axes[0, 0]
    top = max(1.0, float(np.nanmax(mean_AA)))
    image = axis.imshow(mean_AA, cmap=HEAT, vmin=0, vmax=top)
    names = [table.replace("_", "").translate(SUBSCRIPTS) for table in table_names(A - 1)]
    axis.set_xticks(range(A), names)
    axis.set_yticks(range(A), names)
    for row in range(A):
        for column in range(A):
            value = mean_AA[row, column]
            colour = "black" if value > 0.55 * top else "white"
            axis.text(
                column,
                row,
                f"{value:.2f}",
                ha="center",
                va="center",
                color=colour,
                fontsize=10 if A < 10 else 8,
            )
    label(axis, f"Mean cosine distance, {name}", "table", "table")
    axis.spines[:].set_visible(False)
    figure.colorbar(image, ax=axis, shrink=0.8, fraction=0.05).set_label("1 - cosine, mean over token types")
    return figure


def draw_to_embedding(found: Mapping[str, Distances]) -> Figure:
    """Draw the distance of every block's table to E for rare, mid and common types; one panel per run."""
    figure, axes = panel_grid(len(found))
    for axis, (name, of) in zip(axes, found.items(), strict=True):
        blocks = np.arange(1, len(of.mean_AA[ALL]))
        for role, colour, marker in zip(BIN_GROUPS, colours(3), MARKERS, strict=False):
            axis.plot(blocks, of.mean_AA[role][0, 1:], f"{marker}-", color=colour, label=f"{role} types")
        axis.set_xticks(blocks, [str(k) if len(blocks) <= 12 or k % 4 == 0 or k == 1 else "" for k in blocks])
        axis.margins(y=0.15)
        label(axis, f"Distance to E, {name}", "memory block", "mean cosine distance (0 to 2)")
        axis.legend(frameon=False, fontsize=8)
    return figure


def _pairs_table(found: Mapping[str, Distances]) -> DataTable:
    rows: list[tuple[Cell, ...]] = []
    for name, of in found.items():
        mean_AA, names = of.mean_AA[ALL], table_names(len(of.zeros_A) - 1)
        rows += [
            (name, names[a], names[b], of.types[ALL], float(mean_AA[a, b]))
            for a in range(len(names))
            for b in range(a + 1, len(names))
        ]
    return DataTable.of(("run", "table", "other table", "types", "mean cosine distance (0 to 2)"), rows)


def _groups_table(found: Mapping[str, Distances]) -> DataTable:
    rows: list[tuple[Cell, ...]] = []
    for name, of in found.items():
        for group, types in of.types.items():
            blocks = range(1, len(of.zeros_A)) if types else ()
            rows += [(name, k, group, types, float(of.mean_AA[group][0, k])) for k in blocks]
    return DataTable.of(("run", "block", "types of", "types", "mean cosine distance to E (0 to 2)"), rows)


def _finding(name: str, of: Distances) -> str:
    mean_AA = of.mean_AA[ALL]
    to_embedding = mean_AA[0, 1:]
    between = mean_AA[1:, 1:][np.triu_indices(len(mean_AA) - 1, 1)]
    text = (
        f"{name}: over the {of.types[ALL]:,} types that occur in training, the mean cosine distance to E "
        f"goes from {to_embedding.min():.3f} (E_{to_embedding.argmin() + 1}) to {to_embedding.max():.3f} "
        f"(E_{to_embedding.argmax() + 1})"
    )
    if len(between):
        order = (
            "closer to each other than to E"
            if between.mean() < to_embedding.mean()
            else "no closer to each other"
        )
        text += (
            f"; between blocks from {between.min():.3f} to {between.max():.3f}: on average they are {order}"
        )
    by_group = [
        f"{of.mean_AA[role][0, 1:].mean():.3f} for {role} types" for role in BIN_GROUPS if of.types[role]
    ]
    return f"{text}. To E, the mean over blocks is {', '.join(by_group)}."


def _notes(runs: Sequence[TrainedRun], found: Mapping[str, Distances]) -> tuple[str, ...]:
    notes = [
        "Means are over types that occur in the training text; rows of the others never got a gradient of "
        "their own and stand apart, as unseen. Directions drawn at random, as at the start, have a distance "
        "of 1.",
        *(gains_note(of) for of in runs),
    ]
    for name, of in found.items():
        if any(of.zeros_A):
            names = table_names(len(of.zeros_A) - 1)
            listed = ", ".join(f"{names[a]} {count:,}" for a, count in enumerate(of.zeros_A) if count)
            notes.append(f"{name}: rows of zeros ({listed}) have no direction; their cosines are taken as 0.")
    return tuple(notes)
