"""How many gradients a token's row is expected to get, by decile (paper, equation 2.2 and Table 1)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tide_mega.diagnostics.analysis import Analysis
from tide_mega.diagnostics.section import Cell, DataTable, Section
from tide_mega.diagnostics.type_groups import DECILE_SLOTS, ROLE_OF
from tide_mega.diagnostics.updates.measure import (
    FEW,
    Schedule,
    SlotUpdates,
    expected_updates,
    measure_updates,
)
from tide_mega.plotting.lines import Line, line
from tide_mega.plotting.style import GREY, decile_axis, label, panels
from tide_mega.trained.run import TrainedRun

PAPER = Schedule(200_000_000_000 / (8 * 2048), 8 * 2048)

PAPER_TABLE = (
    ("hapax (rarest)", (0, 0), 1, 8.3e-9, 1_660.0),
    ("near-hapax", (1, 1), 4, 3.3e-8, 6_640.0),
    ("uncommon", (2, 2), 10, 8.3e-8, 16_600.0),
    ("common (highest)", (7, 9), 1_000_000, 8.3e-3, 1.66e9),
)
"""Table 1 where it prints one f: tier, first and last bin, count in WikiText-103, f, updates printed."""


@dataclass(frozen=True)
class Setting:
    """Runs that trained equally long on the same text, or the paper's budget on that text."""

    name: str
    schedule: Schedule
    slots: dict[str, SlotUpdates]


def run(analysis: Analysis) -> Section:
    """Show the updates at the runs' own length and batch, and at the paper's."""
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
    """Counts and deciles of the tokenizer's types [V], without the rows that pad the model's vocabulary."""
    bins_V = run.deciles.bin_of_type
    return run.counts[: len(bins_V)], bins_V


def draw(own: Sequence[Setting], paper: Setting) -> Figure:
    """Least, median and greatest per decile: at the runs' length, and at the paper's beside its Table 1."""
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
