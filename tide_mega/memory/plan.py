"""Which table rows a step needs.

Shapes: M microbatches of the step, B sequences, T tokens, N tokens of all microbatches, U distinct token types
among them, G owners.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tide_mega.memory.route import Asked, Owners


@dataclass(frozen=True)
class MemoryPlan:
    """The distinct token types of a step and where each token finds its row among them."""

    ids_U: Tensor
    """Distinct ids, ascending, int64."""
    index_MBT: list[Tensor]
    """For each microbatch the row in `ids_U` of every token, int64."""
    asked: Asked | None = None
    """Rows that go between this process and each owner, where owners were given."""


def plan_rows(
    tokens_MBT: list[Tensor], vocab_size: int | None = None, owners: Owners | None = None
) -> MemoryPlan:
    """Plan the rows of all microbatches of a step together, so that each type is fetched once.

    The host reads everything it must know of the ids in one copy: how many types there are, their span, and how
    many rows each owner is asked for. Nothing else in a step's exchange waits for the device.

    Args:
        tokens_MBT: ids of each microbatch.
        vocab_size: rows of the tables; None leaves the ids unchecked.
        owners: who owns the rows, on processes that fetch from them; then collective over the owners.

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
    distinct_N = torch.zeros_like(ascending_N).scatter_(0, place_N, ascending_N)  # equal ids write the same
    count_1 = is_new_N.sum(0, keepdim=True)
    # Without a token there is no span; 0 is in every table.
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
    """Refuse ids that the tables do not have.

    Raises:
        IndexError: naming the span of the ids and the rows of the tables.
    """
    if lowest < 0 or highest >= vocab_size:
        raise IndexError(
            f"token ids span {lowest}..{highest}, but the memory tables have {vocab_size} rows: "
            "the data was tokenised with a larger vocabulary than model.vocab_size."
        )
