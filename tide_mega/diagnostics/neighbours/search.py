"""Exact nearest neighbours by cosine in several tables at once, the vocabulary streamed in chunks.

Shapes: N rows of a chunk, V vocabulary, D width, A tables, Q queries, R neighbours, S those kept of a piece.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tide_mega.diagnostics.stored_tables import to_unit

NOBODY = -1
"""Stands where a query has fewer neighbours than asked for."""
PIECE = 8192
"""Rows compared with the queries at a time."""
SPARE = 22
"""Kept of each piece beyond R: the order of near ties is settled in fp64."""

Tables = Callable[[], Iterable[tuple[int, Tensor]]]
"""Starts a pass over (first row, rows [N, A, D]) of tables side by side, ascending; the rows are overwritten."""


def nearest(
    tables: Tables, query_ids_Q: NDArray[np.integer], candidates_V: NDArray[np.bool_], neighbours: int = 10
) -> NDArray[np.int64]:
    """Find each query's neighbours in every table, nearest first; takes two passes.

    A query is not its own neighbour. Of equally near ones the lower id comes first. Rows of zeros have no
    direction: they are nobody's neighbours and have none.

    Args:
        tables: starts a pass over the tables.
        query_ids_Q: token types asked for.
        candidates_V: which types may be neighbours.
        neighbours: R.

    Returns:
        ids [Q, A, R], NOBODY where there are no more.

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
                found = _of_piece(
                    query_QAD[:, a], query_ids_Q - base, piece_NAD[:, a], allowed_N, neighbours + SPARE
                )
                ids_QAR[:, a], cosine_QAR[:, a] = _merge(
                    ids_QAR[:, a], cosine_QAR[:, a], found[0] + base, found[1]
                )
    return np.where(np.isfinite(cosine_QAR), ids_QAR, NOBODY)


def _gather(tables: Tables, ids_Q: NDArray[np.integer]) -> Tensor:
    """Return the queries' rows, of norm 1 [Q, A, D].

    Raises:
        ValueError: there is a query beyond the tables.
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
    query_QD: Tensor, query_place_Q: NDArray[np.integer], unit_ND: Tensor, allowed_N: Tensor, most: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return places in the piece and cosines of the nearest [Q, S], -inf for what is not allowed."""
    cosine_QN = query_QD @ unit_ND.T
    cosine_QN.masked_fill_(~(allowed_N & (unit_ND != 0).any(1)), -torch.inf)
    cosine_QN.masked_fill_(~(query_QD != 0).any(1, keepdim=True), -torch.inf)
    own = np.flatnonzero((query_place_Q >= 0) & (query_place_Q < len(unit_ND)))
    cosine_QN[torch.from_numpy(own), torch.from_numpy(query_place_Q[own])] = -torch.inf
    top = cosine_QN.topk(min(most, len(unit_ND)), dim=1)
    # A matrix product's rounding depends on its shape, so also on the chunks: this does not.
    exact_QS = torch.empty(top.values.shape, dtype=torch.float64)
    for exact_S, place_S, query_D in zip(exact_QS, top.indices, query_QD.double(), strict=True):
        torch.sum(unit_ND[place_S].double() * query_D, dim=1, out=exact_S)
    exact_QS.masked_fill_(top.values.isinf(), -torch.inf)
    return top.indices.numpy(), exact_QS.numpy()


def _merge(
    ids_QR: NDArray[np.int64],
    cosine_QR: NDArray[np.float64],
    new_ids_QS: NDArray[np.int64],
    new_cosine_QS: NDArray[np.float64],
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Keep the nearest, of equally near ones the lower ids."""
    ids = np.concatenate((ids_QR, new_ids_QS), axis=1)
    cosine = np.concatenate((cosine_QR, new_cosine_QS), axis=1)
    order_QR = np.lexsort((ids, -cosine), axis=1)[:, : ids_QR.shape[1]]
    return np.take_along_axis(ids, order_QR, 1), np.take_along_axis(cosine, order_QR, 1)


def jaccard(ids_R: NDArray[np.integer], other_R: NDArray[np.integer]) -> float | None:
    """Return |A and B| / |A or B| of two neighbour lists; None where one is empty."""
    one, other = set(ids_R.tolist()) - {NOBODY}, set(other_R.tolist()) - {NOBODY}
    return len(one & other) / len(one | other) if one and other else None
