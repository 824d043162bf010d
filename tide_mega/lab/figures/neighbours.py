"""Nearest neighbours of tokens in the embedding and in the memory's tables (paper, Table 6, Figure 13).

The search is exact, by cosine, in several tables at once, and streams the vocabulary in chunks. The neighbour
lists of whole words are printed; the overlap of each block's lists with the embedding's is drawn as box plots.

Shapes: N rows of a chunk, V vocabulary, D width, K blocks, A = K + 1 tables, Q queries, R neighbours, O queries
that a piece might have nearer rows for, P pairs of a query and a row, S rows of a piece that might be nearest.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from torch import Tensor

from tide_mega.data.tokenizer import Tokenizer
from tide_mega.lab.figures.analysis import Analysis, SkippedError
from tide_mega.lab.figures.kit import (
    by_role,
    file_names,
    gains_note,
    occurring,
    side_by_side,
    table_names,
    to_unit,
)
from tide_mega.lab.figures.section import Cell, DataTable, Section
from tide_mega.lab.plotting import PALETTE, label, panels
from tide_mega.trained.run import TrainedRun

NOBODY = -1
"""Placeholder where a query has fewer neighbours than requested."""
PIECE = 8192
"""Rows compared with the queries at a time."""
FEW = 4
"""Times R: if more rows of a piece might be nearest, they are narrowed down in fp64 first."""
PAIR_ELEMENTS = 2**21
"""Elements of rows multiplied pairwise at a time."""

Tables = Callable[[], Iterable[tuple[int, Tensor]]]
"""Starts a pass over (first row, rows [N, A, D]) of tables side by side, ascending; the rows are overwritten."""


def nearest(
    tables: Tables, query_ids_Q: NDArray[np.integer], candidates_V: NDArray[np.bool_], neighbours: int = 10
) -> NDArray[np.int64]:
    """Find each query's neighbours in every table, nearest first; takes two passes.

    A query is not its own neighbour. Directions are rounded to fp32; ties are broken by the lower id. Zero rows
    have no direction: they are no neighbours and have none.

    Args:
        tables: starts a pass over the tables.
        query_ids_Q: token types to find neighbours of.
        candidates_V: which types may be neighbours.
        neighbours: R.

    Returns:
        Ids [Q, A, R], filled up with NOBODY.

    Raises:
        SkippedError: a row is not finite.
    """
    query_QAD = _gather(tables, query_ids_Q)
    Q, A, _ = query_QAD.shape
    ids_QAR = np.full((Q, A, neighbours), NOBODY, np.int64)
    cosine_QAR = np.full((Q, A, neighbours), -np.inf)
    for first, rows_NAD in tables():
        unit_NAD = to_unit(rows_NAD, range(first, first + len(rows_NAD)))
        for start in range(0, len(unit_NAD), PIECE):
            piece_NAD = unit_NAD[start : start + PIECE]
            base = first + start
            allowed_N = torch.from_numpy(candidates_V[base : base + len(piece_NAD)])
            for a in range(A):
                open_O, place_OS, cosine_OS = _of_piece(
                    query_QAD[:, a], query_ids_Q - base, piece_NAD[:, a], allowed_N, cosine_QAR[:, a]
                )
                ids_QAR[open_O, a], cosine_QAR[open_O, a] = _merge(
                    ids_QAR[open_O, a], cosine_QAR[open_O, a], place_OS + base, cosine_OS
                )
    return np.where(np.isfinite(cosine_QAR), ids_QAR, NOBODY)


def _gather(tables: Tables, ids_Q: NDArray[np.integer]) -> Tensor:
    """Return the queries' rows [Q, A, D], normalised to 1.

    Raises:
        ValueError: a query is beyond the tables.
    """
    query_QAD: Tensor | None = None
    there_Q = np.zeros(len(ids_Q), bool)
    for first, rows_NAD in tables():
        if query_QAD is None:
            query_QAD = torch.empty(len(ids_Q), *rows_NAD.shape[1:])
        here_Q = (ids_Q >= first) & (ids_Q < first + len(rows_NAD))
        query_QAD[torch.from_numpy(here_Q)] = rows_NAD[torch.from_numpy(ids_Q[here_Q] - first)]
        there_Q |= here_Q
    if query_QAD is None or not there_Q.all():
        raise ValueError(f"the tables have no rows {ids_Q[~there_Q].tolist()}")
    return to_unit(query_QAD, ids_Q.tolist())


def _of_piece(
    query_QD: Tensor,
    query_place_Q: NDArray[np.integer],
    unit_ND: Tensor,
    allowed_N: Tensor,
    cosine_QR: NDArray[np.float64],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return which queries the piece might have nearer rows for [O], the rows' places and cosines [O, S].

    `cosine_QR` are those of the nearest so far; cosines of -inf pad the result.
    """
    is_closed_N = ~(allowed_N & (unit_ND != 0).any(1))
    open_O = torch.arange(len(query_QD))
    for dtype in (torch.float32, torch.float64):
        cosine_ON = query_QD[open_O].to(dtype) @ unit_ND.to(dtype).T
        cosine_ON.masked_fill_(is_closed_N, -torch.inf)
        place_O = torch.from_numpy(query_place_Q)[open_O]
        is_here_O = (place_O >= 0) & (place_O < len(unit_ND))
        cosine_ON[is_here_O, place_O[is_here_O]] = -torch.inf
        # Twice the largest error of a dot product of unit rows, in any order of summation.
        margin = unit_ND.size(1) * torch.finfo(dtype).eps
        floor_O = torch.from_numpy(cosine_QR[open_O.numpy(), -1]) - margin
        kept_O = cosine_ON.amax(1) >= floor_O
        kept_O &= (query_QD[open_O] != 0).any(1)
        open_O, cosine_ON, floor_O = open_O[kept_O], cosine_ON[kept_O], floor_O[kept_O]
        most = min(cosine_QR.shape[1], len(unit_ND))
        floor_O = torch.maximum(floor_O, cosine_ON.topk(most, dim=1).values[:, -1].double() - 2 * margin)
        is_near_ON = (cosine_ON >= floor_O[:, None]) & cosine_ON.isfinite()
        if int(is_near_ON.sum()) <= FEW * cosine_QR.shape[1] * len(open_O):
            break
    return (open_O.numpy(), *_exact(query_QD[open_O], unit_ND, is_near_ON))


def _exact(
    query_OD: Tensor, unit_ND: Tensor, is_near_ON: Tensor
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return places and cosines [O, S] of the rows that are near.

    The rounding of a matrix product depends on its shape, hence on the chunks; that of these cosines does not.
    """
    o_P, n_P = is_near_ON.nonzero(as_tuple=True)
    number_O = is_near_ON.sum(1)
    size = max(1, PAIR_ELEMENTS // unit_ND.size(1))
    cosine_P = torch.cat(
        [
            torch.sum(unit_ND[n].double() * query_OD[o].double(), dim=1)
            for o, n in zip(o_P.split(size), n_P.split(size), strict=True)
        ]
    )
    at_P = o_P.numpy(), (torch.arange(len(o_P)) - (number_O.cumsum(0) - number_O)[o_P]).numpy()
    shape = len(query_OD), int(number_O.max()) if len(number_O) else 0
    place_OS, cosine_OS = np.full(shape, NOBODY, np.int64), np.full(shape, -np.inf)
    place_OS[at_P], cosine_OS[at_P] = n_P.numpy(), cosine_P.numpy()
    return place_OS, cosine_OS


def _merge(
    ids_QR: NDArray[np.int64],
    cosine_QR: NDArray[np.float64],
    new_ids_QS: NDArray[np.int64],
    new_cosine_QS: NDArray[np.float64],
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Keep the nearest; ties go to the lower ids."""
    ids = np.concatenate((ids_QR, new_ids_QS), axis=1)
    cosine = np.concatenate((cosine_QR, new_cosine_QS), axis=1)
    order_QR = np.lexsort((ids, -cosine), axis=1)[:, : ids_QR.shape[1]]
    return np.take_along_axis(ids, order_QR, 1), np.take_along_axis(cosine, order_QR, 1)


def jaccard(ids_R: NDArray[np.integer], other_R: NDArray[np.integer]) -> float | None:
    """Return |A and B| / |A or B| of two neighbour lists; None where one is empty."""
    one, other = set(ids_R.tolist()) - {NOBODY}, set(other_R.tolist()) - {NOBODY}
    return len(one & other) / len(one | other) if one and other else None


SPACE = "␣"
"""Shown for a space, so that ` word` and `word` look different."""
LEAST_LETTERS = 5


def readable(tokenizer: Tokenizer, token_id: int) -> str:
    """Return a token's text: spaces as ␣, unprintable characters escaped, partial characters as bytes."""
    piece = tokenizer.token_bytes(token_id)
    try:
        text = piece.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(f"<{byte:02x}>" for byte in piece)
    if not text:
        return f"<id {token_id}>"
    return "".join(SPACE if c == " " else c if c.isprintable() else repr(c)[1:-1] for c in text)


def choose_words(
    tokenizer: Tokenizer, ids: NDArray[np.integer], number: int, seed: int
) -> NDArray[np.integer]:
    """Draw whole words of at least five ASCII letters, lower-case ones first; fewer if there are fewer.

    A word begins with a space if any of `ids` does; otherwise it may be any run of letters.
    """
    texts = {int(v): tokenizer.token_text(int(v)) for v in ids}
    begins = " " if any(text.startswith(" ") for text in texts.values()) else ""
    words = [
        v for v, text in texts.items() if text.startswith(begins) and _is_word(text.removeprefix(begins))
    ]
    lower = [v for v in words if texts[v].islower()]
    pool = np.array(lower if len(lower) >= number else words, dtype=np.int64)
    return sample(pool, number, seed)


def sample(ids: NDArray[np.integer], number: int, seed: int) -> NDArray[np.integer]:
    """Draw ids, ascending; all of them if there are no more."""
    if len(ids) <= number:
        return np.sort(ids)
    return np.sort(np.random.default_rng(seed).choice(ids, number, replace=False))


def _is_word(text: str) -> bool:
    return len(text) >= LEAST_LETTERS and text.isascii() and text.isalpha()


WIDTH = 0.32


def draw_overlaps(name: str, neighbours: int, overlaps: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """Draw the distribution of the overlap with E for every block, roles side by side.

    Args:
        name: the run's.
        neighbours: length of a list.
        overlaps: by role, the Jaccard overlaps of the queries in each block [K].
    """
    shown = [role for role, blocks in overlaps.items() if any(len(values) for values in blocks)]
    K = max(len(blocks) for blocks in overlaps.values())
    figure, axes = panels(1, width=max(6.4, 0.5 * K + 2.4), height=4.6)
    axis = axes[0, 0]
    patches = []
    for i, role in enumerate(shown):
        look: dict[str, Any] = {
            "facecolor": PALETTE[1 - i % 2],
            "alpha": 0.55,
            "hatch": "//" if i % 2 else None,
        }
        axis.boxplot(
            list(overlaps[role]),
            positions=np.arange(1, K + 1) + (i - (len(shown) - 1) / 2) * 1.2 * WIDTH,
            widths=WIDTH,
            patch_artist=True,
            showmeans=True,
            manage_ticks=False,
            boxprops=look,
            medianprops={"color": "black", "linewidth": 1.6},
            meanprops={
                "marker": "D",
                "markerfacecolor": "white",
                "markeredgecolor": "black",
                "markersize": 4,
            },
            flierprops={"marker": ".", "markersize": 4, "markeredgecolor": look["facecolor"]},
        )
        patches.append(Patch(**look, edgecolor="black", label=f"{role} types"))
    top = max((value for role in shown for values in overlaps[role] for value in values), default=0.0)
    axis.set_ylim(-0.03 * max(top, 0.1), 1.2 * max(top, 0.1))  # boxes at 0 and the legend are seen
    axis.set_xlim(0.4, K + 0.6)
    axis.set_xticks(range(1, K + 1))
    title = f"{name}: the {neighbours} nearest under Eₖ and under E"
    label(axis, title, "memory block k (diamond: mean)", "Jaccard overlap (0 to 1)")
    axis.legend(handles=patches, frameon=False, ncols=len(patches) or 1, loc="upper right")
    return figure


NEIGHBOURS = 10
QUERIES = 200
"""Number of rare types, and likewise of common ones."""
WORDS = {"rare": 4, "common": 2}
"""Queries whose neighbours are listed."""


@dataclass(frozen=True)
class Found:
    """The neighbours of a run's queries."""

    run: TrainedRun
    queries: dict[str, NDArray[np.integer]]
    """Ids of the rare and of the common queries."""
    words: dict[str, NDArray[np.integer]]
    """Ids of the queries that are listed."""
    neighbours: dict[int, NDArray[np.int64]]
    """Ids [A, R] by query."""

    def overlaps(self, role: str) -> list[list[float]]:
        """Return J_k of a role's queries with E for every block [K], queries without neighbours left out."""
        lists = [self.neighbours[int(v)] for v in self.queries[role]]
        blocks = range(1, self.run.num_blocks + 1)
        return [[j for ids_AR in lists if (j := jaccard(ids_AR[0], ids_AR[k])) is not None] for k in blocks]


def search(run: TrainedRun, seed: int) -> Found:
    """Draw a run's queries and find their neighbours.

    Raises:
        SkippedError: the run has fewer types than neighbours.
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
    """Return the approximate overlap of two random lists."""
    shared = NEIGHBOURS**2 / candidates
    return shared / (2 * NEIGHBOURS - shared)
