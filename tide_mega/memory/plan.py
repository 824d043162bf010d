"""Plans which table rows a step needs.

Dimensions: M micro-batches of the step, B sequences, T tokens, N tokens of all micro-batches, U distinct token
types among them, G owners.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tide_mega.memory.exchange import Asked, Owners


@dataclass(frozen=True)
class MemoryPlan:
    """The distinct token types of a step, and for each token the position of its row among them."""

    ids_U: Tensor
    """Distinct ids, ascending, int64."""
    index_MBT: list[Tensor]
    """For each micro-batch the position in `ids_U` of every token, int64."""
    asked: Asked | None = None
    """Row counts between this process and each owner, if owners were given."""


def plan_rows(
    tokens_MBT: list[Tensor], vocab_size: int | None = None, owners: Owners | None = None
) -> MemoryPlan:
    """Plan the rows of all micro-batches of a step together, so that each type is fetched once.

    The host learns all it needs in one copy from the device: the number of types, the range of their ids, and the
    rows asked of each owner. Nothing else in a step's exchange synchronises with the device.

    Args:
        tokens_MBT: ids of each micro-batch.
        vocab_size: rows of the tables; None skips the check of the ids.
        owners: the owners of the rows, on processes that fetch from them; the call is then collective over them.

    Raises:
        IndexError: an id is outside the tables.
    """
    flat_N = torch.cat([tokens.flatten() for tokens in tokens_MBT])
    ascending_N, order_N = torch.sort(flat_N)
    is_new_N = torch.ones_like(ascending_N)
    is_new_N[1:] = ascending_N[1:] != ascending_N[:-1]
    place_N = is_new_N.cumsum(0) - 1
    index_N = torch.empty_like(place_N)
    index_N[order_N] = place_N
    distinct_N = torch.zeros_like(ascending_N).scatter_(
        0, place_N, ascending_N
    )  # equal ids write the same value
    count_1 = is_new_N.sum(0, keepdim=True)
    # Without tokens there is no range of ids; 0 is in every table.
    span = [ascending_N[:1], ascending_N[-1:]] if flat_N.numel() else [torch.zeros_like(count_1)] * 2
    known = [count_1, *span]
    if owners is not None:
        known.append(owners.exchange_counts(distinct_N, count_1))
    count, lowest, highest, *asked = torch.cat(known).tolist()
    if vocab_size is not None:
        check_ids(lowest, highest, vocab_size)
    pieces = index_N.split([tokens.numel() for tokens in tokens_MBT])
    return MemoryPlan(
        distinct_N[:count],
        [piece.view_as(tokens) for piece, tokens in zip(pieces, tokens_MBT, strict=True)],
        None if owners is None else Asked.of_counts(asked),
    )


def check_ids(lowest: int, highest: int, vocab_size: int) -> None:
    """Check that the tables have rows for these ids.

    Raises:
        IndexError: naming the range of the ids and the rows of the tables.
    """
    if lowest < 0 or highest >= vocab_size:
        raise IndexError(
            f"token ids span {lowest}..{highest}, but the memory tables have {vocab_size} rows: "
            "the data was tokenised with a larger vocabulary than model.vocab_size."
        )
