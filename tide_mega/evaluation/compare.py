"""Results of several checkpoints side by side, as the paper's Table 2, and what can be said of them."""

import math
from collections.abc import Mapping, Sequence

from tide_mega.evaluation.options import TITLES
from tide_mega.evaluation.results import Cell, Column, Comparison, Measured, Result

PERPLEXITY = "perplexity"
NEAR = 2.0
"""Standard errors within which a score is not told from chance, or two scores from each other."""


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
    """Whether a metric is a share, which the table shows in %."""
    return not any(word in metric for word in (PERPLEXITY, "bits_per_byte"))


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
    """Over the accuracies, every task alike; the errors of tasks are independent."""
    chosen = [cell for column, cell in zip(columns, row, strict=True) if is_accuracy(column.metric)]
    if not chosen:
        return None
    errors = [cell.stderr for cell in chosen if cell.stderr is not None]
    stderr = math.hypot(*errors) / len(chosen) if len(errors) == len(chosen) else None
    return Cell(sum(cell.value for cell in chosen) / len(chosen), stderr)


def like_guessing(column: Column, cell: Cell) -> str | None:
    """Say how a score compares with guessing; None where it is better than that, or guessing has no score.

    As good as guessing is within two standard errors of it: the score's or guessing's own, whichever is larger,
    since a score at either end has none.
    """
    if column.chance is None:
        return None
    for level, name in (
        *((share, "one answer given always") for share in column.constant),
        (column.chance, "chance"),
    ):
        of_level = math.sqrt(level * (100 - level) / column.examples)
        if abs(cell.value - level) <= NEAR * max(cell.stderr or 0.0, of_level) + 1e-9:
            return f"{name} {level:.1f} %"
    return f"below chance {column.chance:.1f} %" if cell.value < column.chance else None


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
        key = runs[0][0].key
        if key.limit is not None:
            notes.append(f"Only the first {key.limit:,} examples of each task (limit={key.limit}).")
        source = (
            "the hub" if key.source == "hub" else "local files, with prompts as the harness's tasks have them"
        )
        notes.append(f"Examples from {source}; {key.harness}, {key.precision}.")
    return tuple(notes)


def _cuts(runs: Sequence[Sequence[Result]], labels: Sequence[str]) -> list[str]:
    """What happened to requests; once for the runs to which the same did."""
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


def format_cell(cell: Cell) -> str:
    """`25.4 ± 0.9`; large perplexities as `9.1e+08 ± 2.5e+07`."""
    style = ".2g" if cell.value >= 1e6 else ",.0f" if cell.value >= 1000 else ".1f"
    error = "" if cell.stderr is None else f" ± {cell.stderr:{style}}"
    return f"{cell.value:{style}}{error}"
