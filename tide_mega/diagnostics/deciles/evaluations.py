"""The evaluations of the runs of an analysis, as far as they can be compared."""

from dataclasses import dataclass

from tide_mega.diagnostics.analysis import Analysis, SkippedError
from tide_mega.diagnostics.base_models import caution, difference
from tide_mega.diagnostics.deciles.run_losses import DecileRun, NoEvaluationError, load_run
from tide_mega.trained.run import TrainedRun


@dataclass(frozen=True)
class Evaluated:
    """A run and the newest of its own evaluations that is not after its checkpoint."""

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
    """What was left out, and what the comparison suffers from."""


def last_evaluations(analysis: Analysis, *, one_base_model: bool = False) -> Evaluations:
    """Read the runs' metrics; runs without evaluation, or on other text than the first, are left out with a note.

    So are, with `one_base_model`, runs of another base model than the first's; else a caution names them.

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
