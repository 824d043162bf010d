"""Rows of the decile comparison: deciles, their roles, tokens outside, and all tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

from tide_mega.data.frequency import BIN_GROUPS
from tide_mega.diagnostics.decile_run import DECILES, OUTSIDE, DecileRun

ROLES = {role: tuple(str(decile) for decile in deciles) for role, deciles in BIN_GROUPS.items()}

CountRange = tuple[int, int]
"""Least and greatest count, in the training text, of the token types of a decile."""


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
    """Loss of the baseline."""
    runs: dict[str, Comparison]
    """By the run's label."""


def build_rows(
    baseline: DecileRun, runs: Sequence[DecileRun], count_ranges: Sequence[CountRange | None] | None = None
) -> list[Row]:
    """Deciles from the rarest to the commonest, then rare, mid, common, dropped, unseen, all."""
    role_of = {decile: role for role, deciles in ROLES.items() for decile in deciles}
    rows = []
    for slot in DECILES + OUTSIDE:
        compared = {
            run.label: _compare(
                run.loss_by_slot[slot],
                baseline.loss_by_slot[slot],
                run.null_mean_by_slot.get(slot),
                run.null_last_by_slot.get(slot),
            )
            for run in runs
        }
        counts = count_ranges[int(slot)] if count_ranges is not None and slot in DECILES else None
        tokens = baseline.count_by_slot[slot]
        rows.append(Row(slot, role_of.get(slot, ""), counts, tokens, baseline.loss_by_slot[slot], compared))
    for role, deciles in ROLES.items():
        compared = {run.label: _compare(getattr(run, role), getattr(baseline, role)) for run in runs}
        tokens = sum(baseline.count_by_slot[decile] for decile in deciles)
        span = f"{deciles[0]}-{deciles[-1]}"
        rows.insert(
            len(rows) - len(OUTSIDE), Row(span, role, None, tokens, getattr(baseline, role), compared)
        )
    compared = {run.label: _compare(run.loss, baseline.loss, run.null_mean, run.null_last) for run in runs}
    rows.append(Row("all", "", None, sum(baseline.count_by_slot.values()), baseline.loss, compared))
    return rows


def _compare(
    loss: float | None, baseline: float | None, null_mean: float | None = None, null_last: float | None = None
) -> Comparison:
    difference = percent = None
    if loss is not None and baseline is not None:
        difference = loss - baseline
        percent = 100 * difference / baseline if baseline else None
    return Comparison(loss, difference, percent, null_mean, null_last)
