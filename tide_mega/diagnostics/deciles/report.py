"""Held-out loss per frequency decile, every run against the baseline (paper, Figure 5)."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from tide_mega.data.batch import TokenBatch
from tide_mega.data.frequency import NUM_BINS
from tide_mega.data.loader import validation_batches
from tide_mega.diagnostics.analysis import Analysis
from tide_mega.diagnostics.deciles.check import SumCheck, check_sums, count_slots, differing
from tide_mega.diagnostics.deciles.evaluations import Evaluated, last_evaluations
from tide_mega.diagnostics.deciles.plot import draw_deciles
from tide_mega.diagnostics.deciles.rows import Row, build_rows
from tide_mega.diagnostics.deciles.run_losses import DECILES, OUTSIDE, DecileRun
from tide_mega.diagnostics.section import Cell, DataTable, Section
from tide_mega.trained.run import TrainedRun

PAPER = (
    "The gain of TIDE with 8 blocks over the 1B baseline falls from 0.704 nats (9.0 %) on the rarest decile "
    "to "
    "0.068 nats (2.4 %) on the commonest, with every decile between them in order; the mean gain on rare "
    "tokens "
    "is about 4.8 times that on common ones."
)


def run(analysis: Analysis) -> Section:
    """Compare the runs' own evaluations; see `Section`."""
    found = last_evaluations(analysis)
    evaluations = [one.evaluation for one in found.of_runs]
    base = next((one.evaluation for one in found.of_runs if one.num_blocks == 0), None)
    others = [evaluation for evaluation in evaluations if evaluation is not base]
    if not others:
        base, others = None, evaluations
    rows = build_rows(base, others, found.of_runs[0].run.deciles.count_ranges)
    checks = {evaluation.label: check_sums(evaluation) for evaluation in evaluations}
    findings = [
        sentence for other in others for sentence in (describe_gains(rows, other), gain_order(rows, other))
    ]
    findings += [describe_check(evaluation, checks[evaluation.label]) for evaluation in evaluations]
    findings.append(_tokens_add_up(found.of_runs[0]))
    notes = list(found.notes)
    if base is None:
        notes.append("There is nothing to compare with: a baseline and a run with memory show the gains.")
    return Section(
        paper=PAPER,
        findings=tuple(sentence for sentence in findings if sentence),
        tables={"deciles": decile_table(rows, base, others), "sums": sums_table(checks)},
        figures={"deciles": draw_deciles(base, others, null_weights=False, looks=analysis.looks)},
        notes=tuple(notes),
    )


def decile_table(rows: Sequence[Row], base: DecileRun | None, others: Sequence[DecileRun]) -> DataTable:
    """Losses and gains of every run; gains are positive where a run is better than the baseline."""
    columns = ["decile", "role", "least count in training", "greatest count in training", "held-out tokens"]
    if base is not None:
        columns.append(f"{base.label} loss (nats)")
    for other in others:
        columns.append(f"{other.label} loss (nats)")
        if base is not None:
            columns += [f"{other.label} gain (nats)", f"{other.label} gain (%)"]
    lines: list[list[Cell]] = []
    for row in rows:
        least, greatest = row.count_range or (None, None)
        cells: list[Cell] = [row.name, row.role, least, greatest, row.tokens]
        if base is not None:
            cells.append(row.baseline)
        for compared in row.runs.values():
            cells.append(compared.loss)
            if base is not None:
                cells += [_minus(compared.difference), _minus(compared.percent)]
        lines.append(cells)
    return DataTable.of(columns, lines)


def sums_table(checks: dict[str, list[SumCheck]]) -> DataTable:
    """Each recorded mean against that of its parts."""
    columns = (
        *("run", "tokens of", "held-out tokens", "recorded loss (nats)"),
        *("parts minus recorded (nats)", "in last places", "most that rounding gives (nats)", "equal"),
    )
    rows = [
        (label, one.what, one.tokens, one.recorded, one.difference, one.in_last_places, one.bound, one.holds)
        for label, of_run in checks.items()
        for one in of_run
    ]
    return DataTable.of(columns, rows)


def describe_gains(rows: Sequence[Row], other: DecileRun) -> str:
    """Say what a run gains on the rarest and commonest decile, and rare against common; "" without baseline."""
    by_name = {row.name: row for row in rows}
    parts = []
    for where, name in (
        ("0", "the rarest decile"),
        (str(NUM_BINS - 1), "the commonest"),
        ("all", "all tokens"),
    ):
        compared = by_name[where].runs[other.label]
        if compared.difference is not None and compared.percent is not None:
            parts.append(f"{-compared.difference:+.3f} nats ({-compared.percent:+.1f} %) on {name}")
    if not parts:
        return ""
    sentence = f"{other.label} gains {', '.join(parts)}"
    rare, common = (_minus(by_name[span].runs[other.label].difference) for span in ("0-2", "7-9"))
    if rare is not None and common is not None:
        sentence += f"; rare {rare:+.3f} and common {common:+.3f} nats"
        if rare > 0 and common > 0:
            sentence += f", {rare / common:.1f} times as much on rare tokens"
    return sentence + "."


def gain_order(rows: Sequence[Row], other: DecileRun) -> str:
    """Say how far the gains fall from the rarest decile to the commonest; "" without baseline."""
    gains = [_minus(row.runs[other.label].difference) for row in rows[: len(DECILES)]]
    known = [gain for gain in gains if gain is not None]
    if len(known) < 2:
        return ""
    better = sum(gain > 0 for gain in known)
    falls = sum(after <= before for before, after in pairwise(known))
    order = (
        "from each decile to the next" if falls == len(known) - 1 else f"at {falls} of {len(known) - 1} steps"
    )
    return (
        f"{other.label} is better on {better} of {len(known)} deciles; its gain falls {order} towards common."
    )


def describe_check(evaluation: DecileRun, checks: Sequence[SumCheck]) -> str:
    """Say whether a run's recorded losses add up, as `check_sums` found."""
    label = evaluation.label
    if wrong := [one for one in checks if not one.holds]:
        each = ", ".join(f"{one.what} by {one.difference:+.3e} nats" for one in wrong)
        return (
            f"{label}: the recorded losses do NOT add up: {each}, more than rounding gives. The evaluation's "
            "line "
            "in metrics.jsonl was changed, or written by other code."
        )
    whole = next((one for one in checks if one.what == "all"), None)
    if whole is None:
        why = _unchecked(evaluation)
        return f"{label}: {why}, so whether the deciles add up to the overall loss was not checked."
    sentence = (
        f"{label}: loss x tokens summed over deciles, {' and '.join(OUTSIDE)} types, over {whole.tokens:,} "
        "tokens, "
        f"is the recorded overall loss {whole.recorded:.6f} but for {whole.difference:+.1e} nats "
        f"({abs(whole.in_last_places):.1f} units of float64's last place; rounding of the means can give "
        f"{whole.bound:.1e})"
    )
    if likewise := [one.what for one in checks if one is not whole]:
        sentence += f"; the losses of {', '.join(likewise)} tokens add up likewise"
    return sentence + "."


def _unchecked(evaluation: DecileRun) -> str:
    if evaluation.loss is None:
        return "no loss is recorded"
    if math.isfinite(evaluation.loss):
        return "the loss of a slot is missing or not finite"
    return "the loss is not finite"


def _tokens_add_up(one: Evaluated) -> str:
    """Count the held-out tokens again, from the dataset."""
    counted = count_slots(_evaluated_text(one.run), one.run.bins)
    recorded = one.evaluation.count_by_slot
    wrong = differing(recorded, counted)
    binned = sum(counted[slot] for slot in DECILES)
    if wrong:
        each = ", ".join(
            f"{slot} {before:,} recorded and {now:,} counted" for slot, (before, now) in wrong.items()
        )
        return (
            f"The held-out tokens counted in {one.run.data} are NOT those recorded: {each}. The dataset is "
            "not the "
            "one the run was evaluated on, or has changed."
        )
    return (
        f"The held-out text, read again, has the recorded number of tokens in every slot: {binned:,} in "
        "deciles, "
        f"{counted['dropped']:,} dropped and {counted['unseen']:,} unseen make {sum(counted.values()):,}."
    )


def _evaluated_text(run: TrainedRun) -> Iterator[TokenBatch]:
    config = run.config
    return validation_batches(
        run.open_text("validation"),
        seed=config.data.seed,
        sequences=config.trainer.eval_sequences,
        micro_batch_size=config.trainer.micro_batch_size,
        dp_rank=0,
        dp_size=1,
    )


def _minus(value: float | None) -> float | None:
    return None if value is None else -value
