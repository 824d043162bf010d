"""Whether runs share their base model: if not, they differ by more than their memory."""

from collections.abc import Sequence
from dataclasses import fields

from tide_mega.trained.run import TrainedRun


def difference(run: TrainedRun, first: TrainedRun) -> str:
    """Return what of a run's base model is not the first's, `num_layers 3 instead of 2, ...`; "" if nothing is."""
    mine, other = run.config.model, first.config.model
    return ", ".join(
        f"{field.name} {getattr(mine, field.name)} instead of {getattr(other, field.name)}"
        for field in fields(mine)
        if field.name != "name" and getattr(mine, field.name) != getattr(other, field.name)
    )


def unlike(runs: Sequence[TrainedRun]) -> dict[str, str]:
    """Return by label the `difference` of runs from the first one, which is the baseline where there is one."""
    differences = {run.label: difference(run, runs[0]) for run in runs}
    return {label: what for label, what in differences.items() if what}


def caution(runs: Sequence[TrainedRun]) -> list[str]:
    """Return a caution if runs do not have the first one's base model."""
    found = unlike(runs)
    if not found:
        return []
    each = "; ".join(f"{label} has {what}" for label, what in found.items())
    return [
        f"CAUTION: the runs do not all have the base model of {runs[0].label}, so they differ by more than their "
        f"memory: {each}."
    ]
