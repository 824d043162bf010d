"""Rows of the decile comparison: deciles, their roles, tokens outside, and all tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tide_mega.data.frequency import BIN_GROUPS
from tide_mega.diagnostics.deciles.run_losses import DECILES, OUTSIDE, DecileRun

ROLES = {role: tuple(str(decile) for decile in deciles) for role, deciles in BIN_GROUPS.items()}

CountRange = tuple[int, int]
"""Least and greatest count, in the training text, of the token types of a decile."""


class Measured(NamedTuple):
    """One run in one row, by itself."""

    loss: float | None
    null_mean: float | None = None
    null_last: float | None = None


@dataclass(frozen=True)
class Comparison:
    """One run in one row; losses in nats per token, null weights 0 to 1."""

    loss: float | None
    difference: float | None
    """Loss minus the baseline's: negative where this run is better."""
    percent: float | None
    """`difference` over the baseline's loss."""
    null_mean: float | None
    """Null weight, mean over the layers."""
    null_last: float | None
    """Null weight in the last layer."""


@dataclass(frozen=True)
class Row:
    """One decile, one role, one kind outside the deciles, or all tokens."""

    name: str
    role: str
    count_range: CountRange | None
    tokens: int
    """Held-out target tokens."""
    baseline: float | None
    """Loss of the baseline; None without one."""
    runs: dict[str, Comparison]
    """By the run's label."""


def build_rows(
    baseline: DecileRun | None,
    runs: Sequence[DecileRun],
    count_ranges: Sequence[CountRange | None] | None = None,
) -> list[Row]:
    """Deciles from the rarest to the commonest, then rare, mid, common, dropped, unseen, all.

    Without a baseline there are losses alone.
    """
    counts = (baseline or runs[0]).count_by_slot

    def row(name: str, role: str, slots: Sequence[str], of: Callable[[DecileRun], Measured]) -> Row:
        before = of(baseline).loss if baseline is not None else None
        compared = {run.label: _compare(of(run), before) for run in runs}
        known = count_ranges[int(name)] if count_ranges is not None and name in DECILES else None
        return Row(name, role, known, sum(counts[slot] for slot in slots), before, compared)

    def of_slot(slot: str) -> Callable[[DecileRun], Measured]:
        return lambda run: Measured(
            run.loss_by_slot[slot], run.null_mean_by_slot.get(slot), run.null_last_by_slot.get(slot)
        )

    def of_role(role: str) -> Callable[[DecileRun], Measured]:
        return lambda run: Measured(getattr(run, role))

    role_of = {decile: role for role, deciles in ROLES.items() for decile in deciles}
    return [
        *(row(slot, role_of[slot], [slot], of_slot(slot)) for slot in DECILES),
        *(row(f"{of[0]}-{of[-1]}", role, of, of_role(role)) for role, of in ROLES.items()),
        *(row(slot, "", [slot], of_slot(slot)) for slot in OUTSIDE),
        row("all", "", list(counts), lambda run: Measured(run.loss, run.null_mean, run.null_last)),
    ]


def _compare(measured: Measured, baseline: float | None) -> Comparison:
    difference = percent = None
    if measured.loss is not None and baseline is not None:
        difference = measured.loss - baseline
        percent = 100 * difference / baseline if baseline else None
    return Comparison(measured.loss, difference, percent, measured.null_mean, measured.null_last)
