"""Expected number of gradient updates of a token's row, by decile (paper, equation 2.2 and Table 1).

E[N_v] = tau (1 - (1 - f_v)^(B T)) over tau steps of B sequences of T tokens; f_v is the token's share of the text.

Shapes: V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from tide_mega.lab.figures.analysis import Analysis
from tide_mega.lab.figures.kit import DECILE_SLOTS, ROLE_OF, by_slot
from tide_mega.lab.figures.section import Cell, DataTable, Section
from tide_mega.lab.plotting import GREY, Line, decile_axis, label, line, panels
from tide_mega.trained.run import TrainedRun

FEW = (1, 10, 100)
"""Types with fewer expected updates than these are counted."""


@dataclass(frozen=True)
class Schedule:
    """Optimizer steps, and the tokens each reads."""

    steps: float
    """tau."""
    tokens_per_step: int
    """B T."""


@dataclass(frozen=True)
class SlotUpdates:
    """Expected updates of the types of a slot; None where it has no type."""

    types: int
    least: float | None
    median: float | None
    greatest: float | None
    few: tuple[int, ...]
    """Types below each of `FEW`."""


def expected_updates(f: ArrayLike, schedule: Schedule) -> NDArray[np.float64]:
    """Evaluate the equation for shares `f`, accurately also for very small ones.

    Raises:
        ValueError: a share is not between 0 and 1.
    """
    share = np.asarray(f, np.float64)
    outside = ~((share >= 0) & (share <= 1))
    if outside.any():
        raise ValueError(f"a token's share of the text lies between 0 and 1, not at {share[outside].flat[0]}")
    with np.errstate(divide="ignore"):  # log 0 at f = 1
        return -schedule.steps * np.expm1(schedule.tokens_per_step * np.log1p(-share))


def measure_updates(
    counts_V: NDArray[np.integer], bins_V: NDArray[np.integer], schedule: Schedule
) -> dict[str, SlotUpdates]:
    """Summarise the expected updates of the types of every slot.

    Raises:
        ValueError: all counts are 0.
    """
    total = int(counts_V.sum())
    if total == 0:
        raise ValueError("the training text has no token: all counts are 0")
    updates_V = expected_updates(counts_V / total, schedule)
    return {slot: _summary(updates_V[ids]) for slot, ids in by_slot(bins_V).items()}


def _summary(updates: NDArray[np.float64]) -> SlotUpdates:
    few = tuple(int((updates < n).sum()) for n in FEW)
    if not len(updates):
        return SlotUpdates(0, None, None, None, few)
    least, median, greatest = (float(of(updates)) for of in (np.min, np.median, np.max))
    return SlotUpdates(len(updates), least, median, greatest, few)


PAPER = Schedule(200_000_000_000 / (8 * 2048), 8 * 2048)

PAPER_TABLE = (
    ("hapax (rarest)", (0, 0), 1, 8.3e-9, 1_660.0),
    ("near-hapax", (1, 1), 4, 3.3e-8, 6_640.0),
    ("uncommon", (2, 2), 10, 8.3e-8, 16_600.0),
    ("common (highest)", (7, 9), 1_000_000, 8.3e-3, 1.66e9),
)
"""Rows of Table 1 with a single f: tier, first and last bin, count in WikiText-103, f, printed updates."""


@dataclass(frozen=True)
class Setting:
    """Runs trained equally long on the same text, or the paper's budget on that text."""

    name: str
    schedule: Schedule
    slots: dict[str, SlotUpdates]


def run(analysis: Analysis) -> Section:
    """Show the expected updates at the runs' own length and batch, and at the paper's."""
    own = _own_settings(analysis.runs)
    widest = analysis.runs[-1]
    paper = Setting("the paper's budget on this text", PAPER, measure_updates(*_types(widest), PAPER))
    return Section(
        paper="Over 200B tokens with B = 8 and T = 2048, a token that occurs once in WikiText-103 is "
        "expected to get some 1,660 non-zero gradients, the commonest 1.66e9: six orders of magnitude.",
        findings=tuple(_finding(setting) for setting in [*own, paper]),
        tables={"expected_updates": _table([*own, paper]), "paper_table_1": _paper_table()},
        figures={"expected_updates": draw(own, paper)},
        notes=_notes(analysis.runs),
    )


def _own_settings(runs: Sequence[TrainedRun]) -> list[Setting]:
    alike: dict[object, tuple[Schedule, list[TrainedRun]]] = {}
    for of in runs:
        schedule = Schedule(of.step, round(of.tokens_per_step))
        key = (schedule, *(values_V.tobytes() for values_V in _types(of)))
        alike.setdefault(key, (schedule, []))[1].append(of)
    return [
        Setting(", ".join(of.label for of in same), schedule, measure_updates(*_types(same[0]), schedule))
        for schedule, same in alike.values()
    ]


def _types(run: TrainedRun) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """Return counts and deciles of the tokenizer's types [V], without the rows that pad the vocabulary."""
    bins_V = run.deciles.bin_of_type
    return run.counts[: len(bins_V)], bins_V


def draw(own: Sequence[Setting], paper: Setting) -> Figure:
    """Draw minimum, median and maximum per decile: at the runs' length, and at the paper's beside its Table 1."""
    figure, axes = panels(2)
    for i, setting in enumerate(own):
        _band(axes[0, 0], setting, line(i))
    _band(axes[0, 1], paper, line(0))
    for tier, (first, last), _, _, printed in PAPER_TABLE:
        name = "paper's Table 1 (WikiText-103)" if tier == PAPER_TABLE[0][0] else None
        axes[0, 1].plot([first, last], [printed] * 2, "X--", color=GREY, label=name, zorder=4)
    for axis, title in zip(axes[0], ("These runs", "200B tokens, B = 8, T = 2048"), strict=True):
        axis.set_yscale("log")
        axis.margins(y=0.12)
        label(axis, title, "", "expected non-zero gradients per type")
        decile_axis(axis)
        axis.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def _band(axis: Axes, setting: Setting, look: Line) -> None:
    filled = [slot for slot in DECILE_SLOTS if setting.slots[slot].types]
    x = [int(slot) for slot in filled]
    low, middle, high = (
        [getattr(setting.slots[slot], which) for slot in filled] for which in ("least", "median", "greatest")
    )
    axis.fill_between(x, low, high, color=look.colour, alpha=0.2, label="least to greatest", linewidth=0)
    axis.plot(x, middle, f"{look.marker}-", color=look.colour, label=f"{setting.name}, median")
    steps = setting.schedule.steps
    axis.axhline(steps, color=look.colour, linestyle=":", label=f"one in every step ({steps:,.0f})")


def _table(settings: Sequence[Setting]) -> DataTable:
    columns = ["runs", "steps", "tokens per step", "decile", "role", "types"]
    columns += [f"{which} (expected updates)" for which in ("least", "median", "greatest")]
    columns += [f"types with fewer than {n}" for n in FEW]
    rows: list[list[Cell]] = []
    for setting in settings:
        schedule = setting.schedule
        for slot, of in setting.slots.items():
            row: list[Cell] = [setting.name, round(schedule.steps), schedule.tokens_per_step]
            row += [slot, ROLE_OF.get(slot, ""), of.types, of.least, of.median, of.greatest, *of.few]
            rows.append(row)
    return DataTable.of(columns, rows)


def _paper_table() -> DataTable:
    columns = ("tier", "bins", "count in WikiText-103", "f", "updates printed", "updates by equation 2.2")
    rows = [
        (
            tier,
            f"{first}-{last}" if last > first else str(first),
            count,
            f,
            printed,
            float(expected_updates(f, PAPER)),
        )
        for tier, (first, last), count, f, printed in PAPER_TABLE
    ]
    return DataTable.of(columns, rows)


def _finding(setting: Setting) -> str:
    slots = setting.slots
    filled = [slot for slot in DECILE_SLOTS if slots[slot].types]
    if not filled:
        return f"{setting.name}: no type lies in a decile."
    rarest, commonest = slots[filled[0]].median, slots[filled[-1]].median
    assert rarest is not None and commonest is not None
    few = [sum(slots[slot].few[i] for slot in filled) for i in range(len(FEW))]
    counted = ", ".join(f"{number:,} fewer than {n}" for n, number in zip(FEW, few, strict=True))
    return (
        f"{setting.name}: in {setting.schedule.steps:,.0f} steps of {setting.schedule.tokens_per_step:,} "
        f"tokens the median type of decile {filled[0]} is expected to get {rarest:,.1f} updates, that of "
        f"decile {filled[-1]} {commonest:,.1f}, {commonest / rarest:,.1f} times as many; of the "
        f"{sum(slots[slot].types for slot in filled):,} types in deciles {counted}."
    )


def _notes(runs: Sequence[TrainedRun]) -> tuple[str, ...]:
    notes = [
        "f is a token's share of the prepared training text, in which tokens of no decile count too. The "
        "paper's budget is applied to the shares in this text.",
        "The paper's 1.66e9 is tau f B T, the approximation for small f. The formula itself never exceeds "
        f"the number of steps, there tau = {PAPER.steps:,.0f}: a token that is in every batch gets one "
        "update a step.",
        "Gradients of the loss are counted. AdamW moves every row in every step, by momentum and weight decay.",
    ]
    if tied := [of.label for of in runs if of.config.model.tie_embeddings]:
        notes.append(
            f"{', '.join(tied)}: the input embedding is the output layer too, through which each of its rows "
            "gets a gradient in every step; the numbers hold for its use as input and for the rows of the "
            "memory's tables."
        )
    return tuple(notes)
