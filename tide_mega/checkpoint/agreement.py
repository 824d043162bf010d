"""Runs something on every rank and makes all ranks agree on its outcome."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from tide_mega.errors import CheckpointError

T = TypeVar("T")


def gather(group: ProcessGroup | None, value: T) -> list[T]:
    """Return every rank's value in rank order; collective over `group`; only this process's value if None."""
    if group is None or group.size() == 1:
        return [value]
    values: list[T | None] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values  # type: ignore[return-value]


def rank_and_size(group: ProcessGroup | None) -> tuple[int, int]:
    """Return this process's rank in the group and the group's size."""
    return (0, 1) if group is None else (group.rank(), group.size())


def is_first(group: ProcessGroup | None) -> bool:
    """Return whether this process is the group's first."""
    return rank_and_size(group)[0] == 0


def on_all(group: ProcessGroup | None, function: Callable[[], T]) -> T:
    """Call `function` on every rank and return this rank's result; collective.

    Raises:
        CheckpointError: it failed on some rank; raised on every rank, with the message of each failure.
    """
    result, failure = None, None
    try:
        result = function()
    except Exception as error:
        failure = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
    failures = {rank: text for rank, text in enumerate(gather(group, failure)) if text is not None}
    if failures:
        ranks: dict[str, list[str]] = {}
        for rank, text in failures.items():
            ranks.setdefault(text, []).append(str(rank))
        raise CheckpointError("; ".join(f"rank {', '.join(on)}: {text}" for text, on in ranks.items()))
    return result  # type: ignore[return-value]


def from_first(group: ProcessGroup | None, function: Callable[[], T]) -> T:
    """Call `function` on the first rank and return its result on all; collective.

    Raises:
        CheckpointError: it failed there; raised on every rank.
    """
    return gather(group, on_all(group, lambda: function() if is_first(group) else None))[0]  # type: ignore
