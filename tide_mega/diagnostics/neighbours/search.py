"""Exact nearest neighbours by cosine in several tables at once, the vocabulary streamed in chunks.

Shapes: N rows of a chunk, V vocabulary, D width, A tables, Q queries, R neighbours, O queries that a piece
might have nearer ones for, P pairs of a query and a row, S rows of a piece that might be nearest.
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
FEW = 4
"""Times R: more of a piece that might be nearest are looked through in fp64 before."""
PAIR_ELEMENTS = 2**21
"""Of rows that are multiplied one by one at a time."""

Tables = Callable[[], Iterable[tuple[int, Tensor]]]
"""Starts a pass over (first row, rows [N, A, D]) of tables side by side, ascending; the rows are overwritten."""


def nearest(
    tables: Tables, query_ids_Q: NDArray[np.integer], candidates_V: NDArray[np.bool_], neighbours: int = 10
) -> NDArray[np.int64]:
    """Find each query's neighbours in every table, nearest first; takes two passes.

    A query is not its own neighbour. Directions are rounded to fp32; of equally near ones the lower id comes
    first. Rows of zeros have no direction: they are nobody's neighbours and have none.

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
                open_O, place_OS, cosine_OS = _of_piece(
                    query_QAD[:, a], query_ids_Q - base, piece_NAD[:, a], allowed_N, cosine_QAR[:, a]
                )
                ids_QAR[open_O, a], cosine_QAR[open_O, a] = _merge(
                    ids_QAR[open_O, a], cosine_QAR[open_O, a], place_OS + base, cosine_OS
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
    query_QD: Tensor,
    query_place_Q: NDArray[np.integer],
    unit_ND: Tensor,
    allowed_N: Tensor,
    cosine_QR: NDArray[np.float64],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return which queries the piece might have nearer rows for [O], the rows' places and cosines [O, S].

    `cosine_QR` are those of the nearest so far; a cosine of -inf fills up.
    """
    is_closed_N = ~(allowed_N & (unit_ND != 0).any(1))
    open_O = torch.arange(len(query_QD))
    for dtype in (torch.float32, torch.float64):
        cosine_ON = query_QD[open_O].to(dtype) @ unit_ND.to(dtype).T
        cosine_ON.masked_fill_(is_closed_N, -torch.inf)
        place_O = torch.from_numpy(query_place_Q)[open_O]
        is_here_O = (place_O >= 0) & (place_O < len(unit_ND))
        cosine_ON[is_here_O, place_O[is_here_O]] = -torch.inf
        # Twice the most by which a dot product of rows of norm 1 can be wrong, in whatever order it is summed.
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

    A matrix product's rounding depends on its shape, so also on the chunks: that of these cosines does not.
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
    """Keep the nearest, of equally near ones the lower ids."""
    ids = np.concatenate((ids_QR, new_ids_QS), axis=1)
    cosine = np.concatenate((cosine_QR, new_cosine_QS), axis=1)
    order_QR = np.lexsort((ids, -cosine), axis=1)[:, : ids_QR.shape[1]]
    return np.take_along_axis(ids, order_QR, 1), np.take_along_axis(cosine, order_QR, 1)


def jaccard(ids_R: NDArray[np.integer], other_R: NDArray[np.integer]) -> float | None:
    """Return |A and B| / |A or B| of two neighbour lists; None where one is empty."""
    one, other = set(ids_R.tolist()) - {NOBODY}, set(other_R.tolist()) - {NOBODY}
    return len(one & other) / len(one | other) if one and other else None
