"""The decile comparison as aligned text, for a terminal."""

from collections.abc import Sequence

from tide_mega.diagnostics.deciles.rows import Row
from tide_mega.diagnostics.deciles.run_losses import DecileRun

_RULED = ("0-2", "dropped", "all")
"""Rows with a rule above them."""


def format_table(baseline: DecileRun, runs: Sequence[DecileRun], rows: Sequence[Row]) -> str:
    """The whole report: heading, table, and what it comes to."""
    head, body = _head(baseline, runs, rows), [_cells(row, runs, rows) for row in rows]
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    rule = "  ".join("-" * width for width in widths)
    table = [_aligned(head, widths), rule]
    for row, cells in zip(rows, body, strict=True):
        if row.name in _RULED:
            table.append(rule)
        table.append(_aligned(cells, widths))
    return "\n".join([*_heading(baseline, runs), "", *table, "", *_findings(runs, rows)])


def _heading(baseline: DecileRun, runs: Sequence[DecileRun]) -> list[str]:
    lines = ["Held-out loss by frequency decile of the target token (nats per token; 0 is the rarest tenth)"]
    trained = {run.label: run.tokens for run in (baseline, *runs)}
    if len(set(trained.values())) == 1:
        lines.append(f"after {baseline.tokens:,} training tokens each")
    else:
        each = ", ".join(f"{label} {tokens:,}" for label, tokens in trained.items())
        lines.append(f"CAUTION: not after the same number of training tokens: {each}")
    return lines


def _head(baseline: DecileRun, runs: Sequence[DecileRun], rows: Sequence[Row]) -> list[str]:
    head = ["decile", "role"]
    if _has_counts(rows):
        head.append("count in training")
    head += ["tokens", baseline.label]
    for run in runs:
        head += [run.label, "difference", "%"]
        if run.has_memory:
            head += ["null (mean)", "null (last)"]
    return head


def _cells(row: Row, runs: Sequence[DecileRun], rows: Sequence[Row]) -> list[str]:
    cells = [row.name, row.role]
    if _has_counts(rows):
        cells.append("" if row.count_range is None else "{:,}-{:,}".format(*row.count_range))
    cells += [f"{row.tokens:,}", _show(row.baseline, ".4f")]
    for run in runs:
        compared = row.runs[run.label]
        cells += [_show(compared.loss, ".4f"), _show(compared.difference, "+.4f")]
        cells.append(_show(compared.percent, "+.2f"))
        if run.has_memory:
            cells += [_show(weight, ".3f") for weight in (compared.null_mean, compared.null_last)]
    return cells


def _findings(runs: Sequence[DecileRun], rows: Sequence[Row]) -> list[str]:
    by_name = {row.name: row for row in rows}
    lines = []
    for run in runs:
        gains = {}
        for name, where in (("all", "all"), ("rare", "0-2"), ("common", "7-9")):
            difference = by_name[where].runs[run.label].difference
            if difference is not None:
                gains[name] = -difference
        if not gains:
            continue
        listed = ", ".join(f"{gain:+.4f} on {name}" for name, gain in gains.items())
        line = f"{run.label}: gain in nats {listed} tokens"
        if gains.get("rare", 0.0) > 0 and gains.get("common", 0.0) > 0:
            line += f" (rare / common = {gains['rare'] / gains['common']:.1f})"
        lines.append(line)
    if any(run.has_memory for run in runs):
        lines.append(
            "null: the null bank's router weight by the input token's decile, mean over layers and last"
        )
    return lines


def _has_counts(rows: Sequence[Row]) -> bool:
    return any(row.count_range is not None for row in rows)


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    left = 2
    padded = [
        cell.ljust(w) if i < left else cell.rjust(w)
        for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(padded).rstrip()


def _show(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
