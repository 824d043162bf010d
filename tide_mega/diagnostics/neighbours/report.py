"""Nearest neighbours of tokens in the input embedding and in the memory's tables (paper, Table 6, Figure 13).

Shapes: Q queries, A = K + 1 tables (E first), R neighbours, K blocks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from tide_mega.diagnostics.analysis import Analysis, SkippedError
from tide_mega.diagnostics.neighbours.plot import draw_overlaps
from tide_mega.diagnostics.neighbours.search import NOBODY, jaccard, nearest
from tide_mega.diagnostics.neighbours.words import choose_words, readable, sample
from tide_mega.diagnostics.section import Cell, DataTable, Section
from tide_mega.diagnostics.stored_tables import file_names, gains_note, side_by_side, table_names
from tide_mega.diagnostics.type_groups import by_role, occurring
from tide_mega.trained.run import TrainedRun

NEIGHBOURS = 10
QUERIES = 200
"""Of rare types, and as many of common ones."""
WORDS = {"rare": 4, "common": 2}
"""Queries whose neighbours are listed."""


@dataclass(frozen=True)
class Found:
    """The neighbours of a run's queries."""

    run: TrainedRun
    queries: dict[str, NDArray[np.integer]]
    """Ids of the rare and of the common queries."""
    words: dict[str, NDArray[np.integer]]
    """Of those that are listed."""
    neighbours: dict[int, NDArray[np.int64]]
    """ids [A, R] by query."""

    def overlaps(self, role: str) -> list[list[float]]:
        """Return J_k of a role's queries with E for every block [K], queries without neighbours left out."""
        lists = [self.neighbours[int(v)] for v in self.queries[role]]
        blocks = range(1, self.run.num_blocks + 1)
        return [[j for ids_AR in lists if (j := jaccard(ids_AR[0], ids_AR[k])) is not None] for k in blocks]


def search(run: TrainedRun, seed: int) -> Found:
    """Draw a run's queries and find their neighbours.

    Raises:
        SkippedError: it has fewer types than neighbours.
    """
    candidates_V = occurring(run.bins)
    if candidates_V.sum() <= NEIGHBOURS:
        raise SkippedError(
            f"it needs more than {NEIGHBOURS} token types that occur, not {candidates_V.sum()}"
        )
    roles = by_role(run.bins)
    queries = {role: sample(roles[role], QUERIES, seed) for role in WORDS}
    words = {role: choose_words(run.tokenizer, roles[role], number, seed) for role, number in WORDS.items()}
    ids_Q = np.unique(np.concatenate([*queries.values(), *words.values()]))
    ids_QAR = nearest(partial(side_by_side, run.weights), ids_Q, candidates_V, NEIGHBOURS)
    return Found(run, queries, words, dict(zip(ids_Q.tolist(), ids_QAR, strict=True)))


def run(analysis: Analysis) -> Section:
    """Compare the neighbours in every block's table with those in E, for every run with memory."""
    found = {of.label: search(of, analysis.options.seed) for of in analysis.with_memory}
    files = file_names(found)
    return Section(
        paper="Of the top-10 neighbours under E and under each block of TIDE-8E-1B, fewer agree for rare "
        "tokens than for common ones, for every block; for `asynchronously` and `fred` the Jaccard overlaps "
        "are 0.11 to 0.43.",
        findings=tuple(_finding(name, of) for name, of in found.items()),
        tables={"overlap": _overlap_table(found), "neighbours": _neighbours_table(found)},
        figures={
            f"overlap_{files[name]}": draw_overlaps(name, NEIGHBOURS, _overlaps(of))
            for name, of in found.items()
        },
        notes=_notes(found),
    )


def _overlaps(of: Found) -> dict[str, list[list[float]]]:
    return {role: of.overlaps(role) for role in of.queries}


def _overlap_table(found: Mapping[str, Found]) -> DataTable:
    quantiles = (0.0, 0.25, 0.5, 0.75, 1.0)
    columns = ["run", "block", "role", "queries", "mean Jaccard overlap (0 to 1)"]
    columns += [
        f"{name} (0 to 1)" for name in ("least", "lower quartile", "median", "upper quartile", "greatest")
    ]
    rows: list[list[Cell]] = []
    for name, of in found.items():
        for role in of.queries:
            for k, values in enumerate(of.overlaps(role)):
                summary = (
                    [float(np.mean(values)), *np.quantile(values, quantiles).tolist()]
                    if values
                    else [None] * 6
                )
                rows.append([name, k + 1, role, len(values), *summary])
    return DataTable.of(columns, rows)


def _neighbours_table(found: Mapping[str, Found]) -> DataTable:
    columns = (
        "run",
        "query",
        "role",
        "count in training",
        "table",
        "neighbours (nearest first)",
        "Jaccard with E",
    )
    rows: list[tuple[Cell, ...]] = []
    for name, of in found.items():
        for role, words in of.words.items():
            for v in words.tolist():
                query = (name, readable(of.run.tokenizer, v), role, int(of.run.counts[v]))
                for a, table in enumerate(table_names(of.run.num_blocks)):
                    ids_R = of.neighbours[v][a]
                    listed = "  ".join(readable(of.run.tokenizer, int(u)) for u in ids_R if u != NOBODY)
                    rows.append((*query, table, listed, jaccard(of.neighbours[v][0], ids_R) if a else None))
    return DataTable.of(columns, rows)


def _finding(name: str, of: Found) -> str:
    means = {
        role: [float(np.mean(values)) if values else np.nan for values in blocks]
        for role, blocks in _overlaps(of).items()
    }
    known = {role: np.array(blocks) for role, blocks in means.items() if np.isfinite(blocks).any()}
    if not known:
        return f"{name}: no query has neighbours under E and under a block."
    parts = [
        f"{np.nanmean(blocks):.3f} for {role} types ({np.nanmin(blocks):.3f} to {np.nanmax(blocks):.3f})"
        for role, blocks in known.items()
    ]
    text = f"{name}: the mean Jaccard overlap with E's {NEIGHBOURS} nearest, over blocks, is {' and '.join(parts)}"
    if len(known) == len(WORDS):
        lower = int((known["rare"] < known["common"]).sum())
        text += f"; rare types agree less than common ones in {lower} of {of.run.num_blocks} blocks"
    return f"{text}."


def _notes(found: Mapping[str, Found]) -> tuple[str, ...]:
    notes = [
        "Neighbours are exact, by cosine, among all types that occur in the training text (special tokens and "
        "punctuation too), the query left out. A blank at a token's beginning is written ␣.",
    ]
    for name, of in found.items():
        notes.append(gains_note(of.run))
        numbers = {role: len(ids) for role, ids in of.queries.items()}
        if any(number < QUERIES for number in numbers.values()):
            listed = ", ".join(f"{number} {role}" for role, number in numbers.items())
            notes.append(f"{name}: there are fewer than {QUERIES} types to ask for: {listed}.")
        without = sum((ids_AR == NOBODY).all(1).any() for ids_AR in of.neighbours.values())
        if without:
            notes.append(
                f"{name}: {without} queries have a row of zeros in some table and no neighbours there."
            )
        if missing := [role for role, number in WORDS.items() if len(of.words[role]) < number]:
            notes.append(
                f"{name}: fewer than {' and '.join(f'{WORDS[role]} {role}' for role in missing)} types are "
                "whole words of five letters or more, so fewer are listed."
            )
        candidates = int(occurring(of.run.bins).sum())
        notes.append(
            f"{name}: drawn at random from {candidates:,} types, two lists of {NEIGHBOURS} would share "
            f"{NEIGHBOURS**2 / candidates:.3g} types, an overlap of {chance(candidates):.2g}."
        )
    return tuple(notes)


def chance(candidates: int) -> float:
    """Return about what two random lists overlap by."""
    shared = NEIGHBOURS**2 / candidates
    return shared / (2 * NEIGHBOURS - shared)
