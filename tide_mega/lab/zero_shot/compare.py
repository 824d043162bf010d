"""Compares the results of several checkpoints, as the paper's Table 2 does, and says what follows from them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from tide_mega.lab.zero_shot.options import TITLES
from tide_mega.lab.zero_shot.results import Cell, Column, Comparison, Key, Measured, Result

T = TypeVar("T", str, int | None)

PERPLEXITY = "perplexity"
SHARES = ("acc", "acc_norm", "exact_match", "f1")
"""Metrics of the harness that are fractions of 1: shown in %, and averaged. All others are shown as they are."""
NEAR = 2.0
"""Standard errors within which a score counts as equal to chance, or two scores to each other."""


def compare(
    runs: Sequence[Sequence[Result]], labels: Sequence[str], absent: Mapping[str, str], metric: str
) -> Comparison:
    """Build the table.

    Args:
        runs: for each run its result on each task, the same tasks in the same order.
        labels: of the runs.
        absent: tasks that were not evaluated, and why.
        metric: acc_norm (where the task has it) or acc.
    """
    columns: list[Column] = []
    cells: list[list[Cell]] = [[] for _ in runs]
    if runs:
        for of_task in zip(*runs, strict=True):
            for name in _metrics(of_task[0].measured, metric):
                columns.append(_column(of_task[0], name))
                for row, result in zip(cells, of_task, strict=True):
                    row.append(_cell(result.measured, name))
    # Perplexity comes first, as in the paper.
    order = sorted(range(len(columns)), key=lambda i: columns[i].metric != PERPLEXITY)
    columns = [columns[i] for i in order]
    cells = [[row[i] for i in order] for row in cells]
    chances = [column.chance for column in columns if is_accuracy(column.metric)]
    known = [chance for chance in chances if chance is not None]
    mean_chance = sum(known) / len(known) if known and len(known) == len(chances) else None
    means = tuple(_mean(columns, row) for row in cells)
    rows = tuple(map(tuple, cells))
    return Comparison(
        tuple(columns),
        tuple(labels),
        rows,
        means,
        mean_chance,
        dict(absent),
        (*_guesses(columns, rows, labels), *_differences(means, labels)),
        _notes(runs, labels, columns),
    )


def is_accuracy(metric: str) -> bool:
    """Whether a metric is a share, shown in %; a filter's name may follow it, as in `f1 (first)`."""
    return metric.split(" (")[0] in SHARES


def is_perplexity(metric: str) -> bool:
    """Whether a metric is a perplexity or its logarithm."""
    return any(word in metric for word in (PERPLEXITY, "bits_per_byte"))


def _metrics(measured: Measured, metric: str) -> list[str]:
    wanted = (metric, "acc", "acc_norm", *measured.scores)
    chosen = next(name for name in wanted if name in measured.scores)
    also = [PERPLEXITY] if PERPLEXITY in measured.scores and chosen != PERPLEXITY else []
    return [*also, chosen]


def _column(result: Result, metric: str) -> Column:
    measured, task = result.measured, result.key.task
    chance = measured.chance if metric in ("acc", "acc_norm") else None
    title = TITLES.get(task, task)
    return Column(
        task,
        f"{title} PPL" if metric == PERPLEXITY else title,
        metric,
        None if chance is None else 100 * chance,
        () if chance is None else tuple(100 * share for share in measured.constant),
        measured.examples,
    )


def _cell(measured: Measured, metric: str) -> Cell:
    score = measured.scores[metric]
    scale = 100.0 if is_accuracy(metric) else 1.0
    return Cell(scale * score.value, None if score.stderr is None else scale * score.stderr)


def _mean(columns: Sequence[Column], row: Sequence[Cell]) -> Cell | None:
    """Average the accuracies with equal weights; errors of tasks are taken as independent."""
    chosen = [cell for column, cell in zip(columns, row, strict=True) if is_accuracy(column.metric)]
    if not chosen:
        return None
    errors = [cell.stderr for cell in chosen if cell.stderr is not None]
    stderr = math.hypot(*errors) / len(chosen) if len(errors) == len(chosen) else None
    return Cell(sum(cell.value for cell in chosen) / len(chosen), stderr)


def like_guessing(column: Column, cell: Cell) -> str | None:
    """Say how a score compares with guessing; None if it is better, or guessing has no score.

    Guessing is the better of chance and of always giving the same answer. A score equals it if it is within two
    standard errors: the score's or guessing's own, whichever is larger, since a score of 0 or 1 has none.
    """
    if column.chance is None:
        return None
    levels = [(column.chance, "chance"), *((share, "one answer given always") for share in column.constant)]
    best, name = max(levels, key=lambda level: level[0])
    margin = NEAR * max(cell.stderr or 0.0, math.sqrt(best * (100 - best) / column.examples)) + 1e-9
    if cell.value - best > margin:
        return None
    return f"{'below ' if best - cell.value > margin else ''}{name} {best:.1f} %"


def _guesses(columns: Sequence[Column], rows: Sequence[Sequence[Cell]], labels: Sequence[str]) -> list[str]:
    sentences = []
    for label, row in zip(labels, rows, strict=True):
        pairs = [
            (column, cell) for column, cell in zip(columns, row, strict=True) if column.chance is not None
        ]
        alike = [
            f"{column.title} {format_cell(cell)} % ({guess})"
            for column, cell in pairs
            if (guess := like_guessing(column, cell)) is not None
        ]
        if alike:
            every = len(alike) == len(pairs)
            which = "no accuracy is" if every else f"{len(alike)} of {len(pairs)} accuracies are not"
            sentences.append(
                f"{label}: {which} better than guessing (within 2 standard errors of it, or below): "
                f"{', '.join(alike)}."
            )
    return sentences


def _differences(means: Sequence[Cell | None], labels: Sequence[str]) -> list[str]:
    sentences = []
    first = means[0] if means else None
    for label, mean in list(zip(labels, means, strict=True))[1:]:
        if first is None or mean is None or first.stderr is None or mean.stderr is None:
            continue
        gap, error = mean.value - first.value, math.hypot(mean.stderr, first.stderr)
        side = "above" if gap >= 0 else "below"
        verdict = "within" if abs(gap) <= NEAR * error else "more than"
        sentences.append(
            f"{label} is on average {abs(gap):.2f} points {side} {labels[0]} ({verdict} 2 standard errors of the "
            f"difference, {error:.2f} each, taking the two runs' answers as independent)."
        )
    return sentences


def _notes(
    runs: Sequence[Sequence[Result]], labels: Sequence[str], columns: Sequence[Column]
) -> tuple[str, ...]:
    metrics = "; ".join(f"{column.title}: {column.metric}" for column in columns)
    notes = [
        "Zero-shot. Accuracies in %, ± one standard error; the mean weighs tasks alike.",
        f"Metrics: {metrics}. acc_norm divides each choice's log-likelihood by its characters.",
    ]
    notes += _cuts(runs, labels)
    if runs and runs[0]:
        keys = [result.key for result in runs[0]]
        notes += [*_limits(keys), *_ways(keys)]
    return tuple(notes)


def _limits(keys: Sequence[Key]) -> list[str]:
    """Say how many examples of which tasks were used, unless all of all."""
    by_limit = _titles_by((key.limit, key) for key in keys)
    if len(by_limit) == 1:
        limit = keys[0].limit
        return [] if limit is None else [f"Only the first {limit:,} examples of each task (limit={limit})."]
    parts = [
        f"the first {limit:,} examples of {titles} (limit={limit})"
        for limit, titles in by_limit.items()
        if limit is not None
    ]
    rest = f"; all examples of {by_limit[None]}" if None in by_limit else ""
    return [f"Only {'; '.join(parts)}{rest}."]


def _ways(keys: Sequence[Key]) -> list[str]:
    """Name the source of examples, harness and precision; per task where they differ."""
    local = "local files, with prompts as the harness's tasks have them"
    by_way = _titles_by(
        (f"from {'the hub' if key.source == 'hub' else local}; {key.harness}, {key.precision}.", key)
        for key in keys
    )
    notes = [
        f"{'Examples' if len(by_way) == 1 else f'{tasks}: examples'} {way}" for way, tasks in by_way.items()
    ]
    if any(key.task == "boolq" and key.source != "hub" for key in keys):
        notes.append("BoolQ's passages have no titles in the local file, unlike the harness's.")
    return notes


def _titles_by(pairs: Iterable[tuple[T, Key]]) -> dict[T, str]:
    """Group the titles of tasks by equal value."""
    found: dict[T, list[str]] = {}
    for value, key in pairs:
        found.setdefault(value, []).append(TITLES.get(key.task, key.task))
    return {value: ", ".join(titles) for value, titles in found.items()}


def _cuts(runs: Sequence[Sequence[Result]], labels: Sequence[str]) -> list[str]:
    """Say which requests were truncated or split; once for runs with equal counts."""
    of: dict[str, list[str]] = {}
    for label, results in zip(labels, runs, strict=True):
        for result in results:
            measured, title = result.measured, TITLES.get(result.key.task, result.key.task)
            for count, text in (
                (measured.truncated, "lost the beginning of their context to the model's longest sequence"),
                (measured.windowed, "were longer than a sequence and scored in windows"),
                (measured.apart, "had context and continuation encoded apart, since their tokens merge"),
            ):
                if count:
                    sentence = f"{title}: {count:,} of {measured.requests:,} requests {text}"
                    of.setdefault(sentence, []).append(label)
    return [f"{sentence} ({', '.join(those)})." for sentence, those in of.items()]


def format_cell(cell: Cell, metric: str = "acc") -> str:
    """Format as `25.4 ± 0.9`; large perplexities as `9.1e+08 ± 2.5e+07`, small non-shares as `0.713 ± 0.020`."""
    size = abs(cell.value)
    small = not is_accuracy(metric) and size < 10
    style = ".2g" if size >= 1e6 else ",.0f" if size >= 1000 else ".3f" if small else ".1f"
    error = "" if cell.stderr is None else f" ± {cell.stderr:{style}}"
    return f"{cell.value:{style}}{error}"
