"""Table 2: zero-shot tasks, from what `python -m tide_mega.evaluate` has left in the run folders."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tide_mega.lab.figures.analysis import Analysis, SkippedError
from tide_mega.lab.figures.section import Cell, DataTable, Section
from tide_mega.lab.zero_shot.compare import compare, is_accuracy
from tide_mega.lab.zero_shot.options import TITLES
from tide_mega.lab.zero_shot.output import draw
from tide_mega.lab.zero_shot.results import FILE, Comparison, Key, Result, read
from tide_mega.trained.run import TrainedRun

_NEEDS = (
    "it needs `python -m tide_mega.evaluate run=...` of these checkpoints first, whose results it finds in "
    "`evaluation` of the run folders"
)
_OLD = "results of another scoring alone"


def run(analysis: Analysis) -> Section:
    """Make the section from the tasks common to all runs with results of the current scoring version.

    Raises:
        SkippedError: there are no such results of these checkpoints, or no task in common.
    """
    found = results_of(analysis.runs)
    given = {run.label: found.get(run.weights.state.save_id, []) for run in analysis.runs}
    current = {label: [one for one in results if one.key.is_current] for label, results in given.items()}
    evaluated = [label for label in given if current[label]]
    left_out = [
        f"{label} has {_OLD}: evaluate it again." if given[label] else f"{label} was not evaluated."
        for label in given
        if not current[label]
    ]
    if not evaluated:
        raise SkippedError(f"{_NEEDS}; there are {_OLD}" if any(given.values()) else _NEEDS)
    rows = in_common([current[label] for label in evaluated])
    dropped = not_in_common({label: given[label] for label in evaluated}, rows[0])
    if not rows[0]:
        raise SkippedError(f"the runs were not evaluated on the same tasks in the same way: {dropped}")
    comparison = compare(rows, evaluated, {}, "acc_norm")
    return Section(
        paper="Mean accuracy of eight tasks at 1B parameters: 61.4 % for the baseline, 63.0 % with K = 8, 63.7 % "
        "with K = 24.",
        findings=(*_means(comparison), *comparison.findings),
        tables={"zero_shot": table(comparison)},
        figures={"zero_shot": draw(comparison)},
        notes=(*comparison.notes, *([f"Not compared: {dropped}."] if dropped else []), *left_out),
    )


def results_of(runs: Sequence[TrainedRun]) -> dict[str, list[Result]]:
    """Return the results in the run folders by checkpoint; a comparison is stored with its last run."""
    found: dict[str, dict[Key, Result]] = {}
    for run in runs:
        path = run.folder / "evaluation" / FILE
        for key, result in read(path).results.items() if path.exists() else ():
            found.setdefault(key.checkpoint, {})[key] = result
    return {checkpoint: list(results.values()) for checkpoint, results in found.items()}


def in_common(runs: Sequence[Sequence[Result]]) -> list[list[Result]]:
    """Return each run's results on the tasks all have; of several settings, the one with the most examples."""
    by_way = [{replace(result.key, checkpoint=""): result for result in results} for results in runs]
    ways = set.intersection(*(set(of_run) for of_run in by_way))
    best: dict[str, Key] = {}
    for way in sorted(ways, key=lambda way: (math.inf if way.limit is None else way.limit, str(way))):
        best[way.task] = way
    return [[of_run[way] for way in best.values()] for of_run in by_way]


def not_in_common(runs: Mapping[str, Sequence[Result]], shown: Sequence[Result]) -> str:
    """Name the tasks not shown, by reason: `SciQ, BoolQ (base has no result)`; "" if none."""
    tasks = {result.key.task for results in runs.values() for result in results}
    by_reason: dict[str, list[str]] = {}
    for task in sorted(tasks - {result.key.task for result in shown}):
        of_task = {label: [one for one in results if one.key.task == task] for label, results in runs.items()}
        lacking = [
            f"{label} has {_OLD if results else 'no result'}"
            for label, results in of_task.items()
            if not any(one.key.is_current for one in results)
        ]
        reason = ", ".join(lacking) or "limit, precision, examples or harness differ"
        by_reason.setdefault(reason, []).append(TITLES.get(task, task))
    return "; ".join(f"{', '.join(titles)} ({reason})" for reason, titles in by_reason.items())


def table(comparison: Comparison) -> DataTable:
    """Return the table, one row per run and the chance level last."""
    columns, chance = ["run"], list[Cell](["chance"])
    for column in comparison.columns:
        unit = "" if column.chance is None else ", %"
        columns += [f"{column.title} ({column.metric}{unit})", f"{column.title} standard error"]
        chance += [column.chance, None]
    rows: list[list[Cell]] = []
    for label, cells, mean in zip(comparison.labels, comparison.cells, comparison.means, strict=True):
        row: list[Cell] = [label]
        for cell in cells:
            row += [cell.value, cell.stderr]
        rows.append([*row, mean.value if mean else None, mean.stderr if mean else None])
    return DataTable.of(
        [*columns, "mean accuracy (%)", "mean standard error"],
        [*rows, [*chance, comparison.mean_chance, None]],
    )


def _means(comparison: Comparison) -> list[str]:
    number = sum(is_accuracy(column.metric) for column in comparison.columns)
    return [
        f"{label}: mean accuracy of {number} task{'s' if number > 1 else ''} {mean.value:.1f} %"
        + ("" if mean.stderr is None else f" ± {mean.stderr:.1f}")
        + (
            "."
            if comparison.mean_chance is None
            else f", where guessing gives {comparison.mean_chance:.1f} %."
        )
        for label, mean in zip(comparison.labels, comparison.means, strict=True)
        if mean is not None
    ]
