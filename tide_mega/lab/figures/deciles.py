"""Held-out loss per frequency decile, every run against the baseline (paper, Figure 5).

Compares the runs' latest evaluations, as far as they are comparable, and checks that each adds up: the losses of
the parts to the loss of the whole, and the token counts to the held-out text.

Shapes: V vocabulary.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np

from tide_mega.data.frequency import DROPPED, NUM_BINS
from tide_mega.data.loader import TokenBatch, validation_batches
from tide_mega.lab.figures.analysis import Analysis, SkippedError
from tide_mega.lab.figures.decile_comparison import (
    DECILES,
    OUTSIDE,
    ROLES,
    DecileRun,
    NoEvaluationError,
    Row,
    build_rows,
    draw_deciles,
    load_run,
)
from tide_mega.lab.figures.kit import caution, difference
from tide_mega.lab.figures.section import Cell, DataTable, Section
from tide_mega.trained.run import TrainedRun

UNIT_ROUNDOFF = Fraction(1, 2**53)
"""Of float64."""


@dataclass(frozen=True)
class SumCheck:
    """A recorded mean loss against that of its parts; nats per token."""

    what: str
    """all, rare, mid or common."""
    tokens: int
    recorded: float
    difference: float
    """Sum over the parts of loss x count, over the count, minus what was recorded; computed without rounding."""
    bound: float
    """The largest difference that rounding can cause."""

    @property
    def in_last_places(self) -> float:
        """The difference in units of the recorded loss's last binary place."""
        return self.difference / math.ulp(self.recorded)

    @property
    def holds(self) -> bool:
        """Whether the two are equal up to the rounding of the recorded numbers."""
        return abs(self.difference) <= self.bound


def check_sums(run: DecileRun) -> list[SumCheck]:
    """Compare each recorded mean with its slots: of all tokens, and of rare, mid and common ones.

    Every recorded mean is sum / count, with the sum accumulated in float64. With n parts, their weighted mean in
    exact rational arithmetic therefore differs from the recorded one by at most n + 1 roundings, and not at all
    if the means are exact in float64. Absent and non-finite means are left out.
    """
    parts = {"all": DECILES + OUTSIDE, **ROLES}
    recorded = {"all": run.loss, "rare": run.rare, "mid": run.mid, "common": run.common}
    checks = []
    for what, slots in parts.items():
        mean = recorded[what]
        used = [slot for slot in slots if run.count_by_slot[slot]]
        losses = [run.loss_by_slot[slot] for slot in used]
        if mean is None or not math.isfinite(mean):
            continue
        finite = [loss for loss in losses if loss is not None and math.isfinite(loss)]
        if len(finite) < len(used):
            continue
        tokens = sum(run.count_by_slot[slot] for slot in used)
        total = sum(
            (Fraction(loss) * run.count_by_slot[slot] for loss, slot in zip(finite, used, strict=True)),
            Fraction(0),
        )
        exact = total / tokens
        bound = (len(used) + 1) * UNIT_ROUNDOFF * abs(exact)
        checks.append(SumCheck(what, tokens, mean, float(exact - Fraction(mean)), float(bound)))
    return checks


def count_slots(batches: Iterable[TokenBatch], bin_of_type: np.ndarray) -> dict[str, int]:
    """Count the labels of batches by slot; `bin_of_type` is [V]. Negative labels are padding."""
    counts = dict.fromkeys(DECILES + OUTSIDE, 0)
    for batch in batches:
        labels = batch.labels_BT.numpy().ravel()
        bins, found = np.unique(bin_of_type[labels[labels >= 0]], return_counts=True)
        for of_bin, number in zip(bins.tolist(), found.tolist(), strict=True):
            counts[_slot(of_bin)] += number
    return counts


def differing(recorded: Mapping[str, int], counted: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Return, for the slots whose numbers differ, (recorded, counted)."""
    return {slot: (recorded[slot], counted[slot]) for slot in counted if recorded[slot] != counted[slot]}


def _slot(of_bin: int) -> str:
    if of_bin >= 0:
        return str(of_bin)
    return "dropped" if of_bin == DROPPED else "unseen"


@dataclass(frozen=True)
class Evaluated:
    """A run and its newest evaluation up to its checkpoint."""

    run: TrainedRun
    evaluation: DecileRun

    @property
    def num_blocks(self) -> int:
        """K."""
        return self.run.num_blocks


@dataclass(frozen=True)
class Evaluations:
    """Runs evaluated on the same held-out tokens, the smallest K first."""

    of_runs: tuple[Evaluated, ...]
    notes: tuple[str, ...]
    """What was left out, and what limits the comparison."""


def last_evaluations(analysis: Analysis, *, one_base_model: bool = False) -> Evaluations:
    """Read the runs' metrics; leaves out, with a note, runs not evaluated, or on other text than the first.

    With `one_base_model` it also leaves out runs whose base model is not the first's; otherwise a caution names
    them.

    Raises:
        SkippedError: no run has an evaluation.
    """
    found: list[Evaluated] = []
    notes: list[str] = []
    for run in analysis.runs:
        try:
            evaluation = load_run(run.folder, run.label, run.step)
        except NoEvaluationError:
            notes.append(f"{run.label} is left out: it has no evaluation up to step {run.step:,}.")
            continue
        if found and found[0].evaluation.count_by_slot != evaluation.count_by_slot:
            notes.append(
                f"{run.label} is left out: it was not evaluated on the same text as {found[0].run.label}; "
                "evaluate both with the same data and trainer.eval_sequences."
            )
            continue
        if one_base_model and found and (what := difference(run, found[0].run)):
            notes.append(
                f"{run.label} is left out: its base model is not that of {found[0].run.label} ({what})."
            )
            continue
        if evaluation.step < run.step:
            notes.append(
                f"{run.label}: the evaluation is of step {evaluation.step:,}, the newest up to the "
                "checkpoint "
                f"at step {run.step:,}."
            )
        found.append(Evaluated(run, evaluation))
    if not found:
        raise SkippedError("it needs a run that was evaluated while it was trained (trainer.eval_every)")
    notes += caution([one.run for one in found])
    notes += unequal_tokens([one.evaluation for one in found])
    return Evaluations(tuple(found), tuple(notes))


def unequal_tokens(runs: list[DecileRun]) -> list[str]:
    """Return a caution if runs were not trained on the same number of tokens."""
    if len({run.tokens for run in runs}) < 2:
        return []
    each = ", ".join(f"{run.label} {run.tokens:,}" for run in runs)
    return [f"CAUTION: the runs are not after the same number of training tokens: {each}."]


PAPER = (
    "The gain of TIDE with 8 blocks over the 1B baseline falls from 0.704 nats (9.0 %) on the rarest decile "
    "to "
    "0.068 nats (2.4 %) on the commonest, with every decile between them in order; the mean gain on rare "
    "tokens "
    "is about 4.8 times that on common ones."
)


def run(analysis: Analysis) -> Section:
    """Compare the runs' logged evaluations; see `Section`."""
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
    """Recount the held-out tokens from the dataset and compare."""
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
