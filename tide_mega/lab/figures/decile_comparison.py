"""Held-out loss by frequency decile: runs against a baseline, as text, data and a figure (paper, Figure 5).

Evaluations are read from the metrics.jsonl of run folders. Rows of the comparison are the deciles, their roles
(rare, mid, common), the tokens outside the deciles, and all tokens. The figure shows losses, gains over the
baseline, and the null bank's weight.

Shapes: L layers.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tide_mega.data.frequency import BIN_GROUPS, NUM_BINS
from tide_mega.errors import StatedError
from tide_mega.files import json_values
from tide_mega.lab.plotting import BASELINE, Line, decile_axis, label, legend, line, panels
from tide_mega.metrics.jsonl import read_metrics
from tide_mega.text_table import aligned

DECILES = tuple(str(decile) for decile in range(NUM_BINS))
"""From the rarest tenth of the token types to the commonest."""
OUTSIDE = ("dropped", "unseen")
"""Tokens outside the deciles: special, blank or punctuation; types absent from the training text."""


class NoEvaluationError(StatedError, ValueError):
    """A run was never evaluated."""


@dataclass(frozen=True)
class DecileRun:
    """One evaluation. Losses in nats per token, null weights 0 to 1; None where there is no token."""

    label: str
    step: int
    tokens: int
    """Training tokens consumed."""
    loss: float | None
    rare: float | None
    mid: float | None
    common: float | None
    loss_by_slot: dict[str, float | None]
    """Keyed by `DECILES` and `OUTSIDE`."""
    count_by_slot: dict[str, int]
    """Held-out target tokens."""
    null_by_layer: list[float | None]
    """[L]; empty without memory."""
    null_mean_by_slot: dict[str, float | None]
    """Mean over the layers, by the input token's slot; empty without memory."""
    null_last_by_slot: dict[str, float | None]
    """The last layer; empty without memory."""

    @property
    def has_memory(self) -> bool:
        """Whether the model has routers, so null weights."""
        return bool(self.null_by_layer)

    @property
    def null_mean(self) -> float | None:
        """Null weight over all tokens, mean over the layers."""
        known = [weight for weight in self.null_by_layer if weight is not None]
        return sum(known) / len(known) if known else None

    @property
    def null_last(self) -> float | None:
        """Null weight over all tokens in the last layer."""
        return self.null_by_layer[-1] if self.null_by_layer else None

    @classmethod
    def from_record(cls, label: str, record: Mapping[str, Any]) -> "DecileRun":
        """Build it from an evaluation's line of metrics.jsonl.

        Raises:
            ValueError: if the line lacks a field.
        """
        try:
            null = record["null_weight_by_bin"]
            return cls(
                label=label,
                step=record["step"],
                tokens=record["tokens"],
                loss=_number(record["loss"]),
                rare=_number(record["rare"]),
                mid=_number(record["mid"]),
                common=_number(record["common"]),
                loss_by_slot={slot: _number(record["loss_by_bin"][slot]) for slot in DECILES + OUTSIDE},
                count_by_slot={slot: int(record["count_by_bin"][slot]) for slot in DECILES + OUTSIDE},
                null_by_layer=[_number(weight) for weight in record["null_weight_by_layer"]],
                null_mean_by_slot={slot: _number(weight) for slot, weight in null.get("mean", {}).items()},
                null_last_by_slot={slot: _number(weight) for slot, weight in null.get("last", {}).items()},
            )
        except KeyError as error:
            raise ValueError(
                f"the evaluation of {label!r} has no {error}: was it written by tide_mega?"
            ) from error


def read_evaluations(run_dir: Path, label: str | None = None, until: int | None = None) -> list[DecileRun]:
    """Return every evaluation of a run folder, by training tokens; of repeated ones (restarts) the last.

    Args:
        run_dir: the run folder.
        label: None means the folder's name.
        until: leave out evaluations after this step.

    Raises:
        NoEvaluationError: if there is none.
        ValueError: an evaluation's line lacks a field.
    """
    path = run_dir / "metrics.jsonl"
    records = read_metrics(path) if path.exists() else []
    found = {
        record["step"]: DecileRun.from_record(label or run_dir.name, record)
        for record in records
        if record.get("kind") == "eval" and (until is None or record["step"] <= until)
    }
    if not found:
        so_far = "" if until is None else f" up to step {until}"
        raise NoEvaluationError(
            f"{path} holds no evaluation{so_far}: let the run reach one, or check the run folder's name"
        )
    return [found[step] for step in sorted(found)]


def load_run(run_dir: Path, label: str | None = None, until: int | None = None) -> DecileRun:
    """Return the last of `read_evaluations`."""
    return read_evaluations(run_dir, label, until)[-1]


def _number(value: float | None) -> float | None:
    return None if value is None else float(value)


ROLES = {role: tuple(str(decile) for decile in deciles) for role, deciles in BIN_GROUPS.items()}

CountRange = tuple[int, int]
"""Least and greatest count, in the training text, of the token types of a decile."""


class Measured(NamedTuple):
    """One run in one row, without comparison."""

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

    Without a baseline, rows have losses only.
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


_RULED = ("0-2", "dropped", "all")
"""Rows with a rule above them."""


def format_table(baseline: DecileRun, runs: Sequence[DecileRun], rows: Sequence[Row]) -> str:
    """Return the whole report: heading, table and findings."""
    head, body = _head(baseline, runs, rows), [_cells(row, runs, rows) for row in rows]
    table = aligned([head], body, left=2, ruled=[n for n, row in enumerate(rows) if row.name in _RULED])
    return "\n".join([*_heading(baseline, runs), "", table, "", *_findings(runs, rows)])


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


def _show(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


_HEADROOM = 0.16
"""Share of the axis kept free above the data, for the names of the roles."""


def plot_deciles(baseline: DecileRun, runs: Sequence[DecileRun], path: Path) -> None:
    """Write the figure of `draw_deciles` as a PNG."""
    draw_deciles(baseline, runs).savefig(path, format="png")


def draw_deciles(
    baseline: DecileRun | None,
    runs: Sequence[DecileRun],
    *,
    null_weights: bool = True,
    looks: Mapping[str, Line] | None = None,
) -> Figure:
    """Draw losses per decile; gains over the baseline, if any; null weights, if runs have memory.

    Pass `looks`, by label, if other figures show more runs than these.
    """
    if looks is None:
        looks = {run.label: line(i) for i, run in enumerate(runs)}
        looks |= {} if baseline is None else {baseline.label: BASELINE}
    with_null = null_weights and any(run.has_memory for run in runs)
    figure, axes = panels(1 + (baseline is not None) + with_null, height=4.6)
    rest = iter(axes[0])
    _losses(next(rest), baseline, runs, looks)
    if baseline is not None:
        _gains(next(rest), baseline, runs, looks)
    if with_null:
        _null_weights(next(rest), [run for run in runs if run.has_memory], looks)
    return figure


def _losses(
    axis: Axes, baseline: DecileRun | None, runs: Sequence[DecileRun], looks: Mapping[str, Line]
) -> None:
    for run in runs if baseline is None else (baseline, *runs):
        x, y = points(run.loss_by_slot)
        look = looks[run.label]
        size = None if run is baseline else 5
        axis.plot(x, y, f"{look.marker}{look.dash}", color=look.colour, label=run.label, markersize=size)
    _room_above(axis)
    decile_axis(axis, "target token")
    label(axis, "Held-out loss", axis.get_xlabel(), "cross entropy (nats per token)")
    legend(axis, place="lower left", size=10)


def _gains(axis: Axes, baseline: DecileRun, runs: Sequence[DecileRun], looks: Mapping[str, Line]) -> None:
    width = 0.8 / len(runs)
    for i, run in enumerate(runs):
        gains: dict[str, float | None] = {}
        for slot in DECILES:
            before, after = baseline.loss_by_slot[slot], run.loss_by_slot[slot]
            gains[slot] = None if before is None or after is None else before - after
        x, y = points(gains)
        middle = [v + width * (i - (len(runs) - 1) / 2) for v in x]
        bars = axis.bar(middle, y, width, color=looks[run.label].colour, label=run.label)
        if len(runs) == 1:
            axis.bar_label(bars, fmt="%.3f", fontsize=7, padding=2)
    axis.axhline(0, color="black", linewidth=0.8)
    _room_above(axis)
    decile_axis(axis, "target token")
    title = f"Gain over {baseline.label} (higher is better)"
    label(axis, title, axis.get_xlabel(), "loss reduction (nats per token)")
    if len(runs) > 1:
        legend(axis, inside=0)  # bars leave no room within


def _null_weights(axis: Axes, runs: Sequence[DecileRun], looks: Mapping[str, Line]) -> None:
    for run in runs:
        prefix = f"{run.label}, " if len(runs) > 1 else ""
        look = looks[run.label]
        x, y = points(run.null_mean_by_slot)
        axis.plot(x, y, f"{look.marker}-", color=look.colour, label=f"{prefix}mean over layers")
        x, y = points(run.null_last_by_slot)
        text = f"{prefix}last layer"
        axis.plot(x, y, f"{look.marker}:", color=look.colour, label=text, markerfacecolor="white")
    axis.set_ylim(0, 1.1)
    axis.set_yticks([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    decile_axis(axis, "input token")
    label(axis, "Null-bank weight", axis.get_xlabel(), "mean router weight (0 to 1)")
    legend(axis)


def points(by_slot: Mapping[str, float | None]) -> tuple[list[int], list[float]]:
    """Return x and y of the deciles that have a finite value."""
    known = [(int(slot), by_slot.get(slot)) for slot in DECILES]
    found = [(x, y) for x, y in known if y is not None and math.isfinite(y)]
    return [x for x, _ in found], [y for _, y in found]


def _room_above(axis: Axes) -> None:
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + _HEADROOM * (high - low))


@dataclass(frozen=True)
class DecileReport:
    """A baseline and the runs compared with it on the same held-out tokens."""

    baseline: DecileRun
    runs: tuple[DecileRun, ...]
    count_ranges: tuple[CountRange | None, ...] | None = None
    """By decile (None for one without types); None as a whole if unknown."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("no run to compare with the baseline: give at least two run folders")
        labels = [self.baseline.label, *(run.label for run in self.runs)]
        if len(set(labels)) < len(labels):
            raise ValueError(f"labels must differ from each other: {', '.join(labels)}")
        if self.count_ranges is not None and len(self.count_ranges) != len(DECILES):
            raise ValueError(f"count_ranges has {len(self.count_ranges)} entries instead of {len(DECILES)}")
        for run in self.runs:
            _check_same_text(self.baseline, run)

    @property
    def rows(self) -> list[Row]:
        """Deciles from the rarest to the commonest, then rare, mid, common, dropped, unseen, all."""
        return build_rows(self.baseline, self.runs, self.count_ranges)

    def text(self) -> str:
        """Heading, aligned table and findings."""
        return format_table(self.baseline, self.runs, self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values; non-finite numbers as `files.json_values` writes them."""
        content = {
            "unit": "nats per token",
            "baseline": asdict(self.baseline),
            "runs": [asdict(run) for run in self.runs],
            "rows": [asdict(row) for row in self.rows],
        }
        return json_values(content)

    def to_csv(self) -> str:
        """Return the rows as CSV; columns of a run start with its label."""
        out = io.StringIO()
        lines = [_flat(row) for row in self.rows]
        writer = csv.DictWriter(out, fieldnames=list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        return out.getvalue()

    def write(self, folder: Path) -> None:
        """Write deciles.txt, deciles.json, deciles.csv and deciles.png into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "deciles.txt").write_text(self.text() + "\n", encoding="utf-8")
        content = json.dumps(self.to_dict(), indent=2, allow_nan=False)
        (folder / "deciles.json").write_text(content + "\n", encoding="utf-8")
        (folder / "deciles.csv").write_text(self.to_csv(), encoding="utf-8")
        plot_deciles(self.baseline, self.runs, folder / "deciles.png")


def compare_runs(
    run_dirs: Mapping[str, Path], count_ranges: Sequence[CountRange | None] | None = None
) -> DecileReport:
    """Compare the last evaluations of run folders, given by label, with that of the first.

    Args:
        run_dirs: label to run folder, the baseline first.
        count_ranges: for each decile, the least and greatest count of its types in the training text
            (`DecileTable.count_ranges`).

    Raises:
        ValueError: if a folder has no evaluation, or they were evaluated on different text.
    """
    runs = [load_run(folder, label) for label, folder in run_dirs.items()]
    if not runs:
        raise ValueError("no run folder is given: give the baseline's and at least one more")
    return DecileReport(runs[0], tuple(runs[1:]), None if count_ranges is None else tuple(count_ranges))


def _check_same_text(baseline: DecileRun, run: DecileRun) -> None:
    for slot, tokens in baseline.count_by_slot.items():
        if run.count_by_slot[slot] != tokens:
            raise ValueError(
                f"{run.label!r} and {baseline.label!r} were not evaluated on the same text: slot {slot} has "
                f"{run.count_by_slot[slot]} and {tokens} tokens; use the same data and trainer.eval_sequences"
            )


def _flat(row: Row) -> dict[str, Any]:
    least, greatest = row.count_range or (None, None)
    flat: dict[str, Any] = {"decile": row.name, "role": row.role, "count_min": least, "count_max": greatest}
    flat |= {"tokens": row.tokens, "baseline_loss": row.baseline}
    for run, compared in row.runs.items():
        flat |= {f"{run}_{name}": value for name, value in asdict(compared).items()}
    return flat
