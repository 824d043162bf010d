"""Loss of rare, mid and common tokens against the number of memory blocks (paper, Figure 7)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tide_mega.data.frequency import BIN_GROUPS
from tide_mega.lab.figures.analysis import Analysis, SkippedError
from tide_mega.lab.figures.decile_comparison import DecileRun
from tide_mega.lab.figures.deciles import last_evaluations
from tide_mega.lab.figures.section import DataTable, Section
from tide_mega.lab.plotting import label, legend, line, panels

ROLES = tuple(BIN_GROUPS)

PAPER = (
    "From K = 0 to K = 24 the loss of rare tokens falls from 6.671 to 6.250 nats (-0.421), that of common "
    "ones by "
    "0.075, 5.6 times less; the slope against K is 3.7 times as steep. K = 2 already has about 55 % of the "
    "rare gain."
)


@dataclass(frozen=True)
class AgainstBlocks:
    """Losses in nats per token by number of memory blocks, ascending; NaN where there was no such token."""

    blocks: tuple[int, ...]
    losses: dict[str, tuple[float, ...]]
    """For rare, mid and common tokens; the mean over runs of the same K."""

    def differences(self, role: str) -> list[float]:
        """Loss minus that of the smallest K: negative where memory helps."""
        return [loss - self.losses[role][0] for loss in self.losses[role]]

    def shares(self, role: str = "rare") -> list[float] | None:
        """Share of the largest K's gain that each K reaches; None where that gain is not positive or not known.

        A share is not finite where the loss of its K is not.
        """
        differences = self.differences(role)
        if not (math.isfinite(differences[-1]) and differences[-1] < 0):
            return None
        return [0.0, *(d / differences[-1] for d in differences[1:])]

    def slope(self, role: str) -> float:
        """Slope of the least-squares line: change of the loss per additional block.

        Losses that are not finite are left out; NaN where fewer than two remain.
        """
        blocks, losses = np.array(self.blocks), np.array(self.losses[role])
        known = np.isfinite(losses)
        return float(np.polyfit(blocks[known], losses[known], 1)[0]) if known.sum() > 1 else math.nan


def measure(runs: Sequence[tuple[int, DecileRun]]) -> AgainstBlocks:
    """Average evaluations by K.

    Raises:
        SkippedError: there are fewer than two different K.
    """
    blocks = sorted({number for number, _ in runs})
    if len(blocks) < 2:
        raise SkippedError("it needs evaluated runs with at least two different numbers of memory blocks")
    losses = {
        role: tuple(_mean([getattr(found, role) for number, found in runs if number == k]) for k in blocks)
        for role in ROLES
    }
    return AgainstBlocks(tuple(blocks), losses)


def draw(data: AgainstBlocks) -> Figure:
    """Losses; differences to the smallest K; with three K and a gain, the share of it reached."""
    shares = data.shares() if len(data.blocks) > 2 else None
    figure, axes = panels(2 + (shares is not None))
    for i, role in enumerate(ROLES):
        look = line(i)
        mark = {"marker": look.marker, "color": look.colour, "linestyle": ("-", "--", ":")[i], "label": role}
        axes[0, 0].plot(data.blocks, data.losses[role], **mark)
        axes[0, 1].plot(data.blocks, data.differences(role), **mark)
    label(axes[0, 0], "Held-out loss", "memory blocks K", "cross entropy (nats per token)")
    first = data.blocks[0]
    label(
        axes[0, 1],
        f"Difference to K = {first} (lower is better)",
        "memory blocks K",
        "difference in loss (nats per token)",
    )
    axes[0, 1].axhline(0, color="black", linewidth=0.8, zorder=0)
    if shares is not None:
        _draw_shares(axes[0, 2], data.blocks, shares)
    for axis in axes[0]:
        axis.set_xticks(data.blocks)
    for axis in axes[0, :2]:
        legend(axis, inside=0)
    return figure


def run(analysis: Analysis) -> Section:
    """Compare the evaluations of the runs that share the baseline's base model; see `Section`.

    Raises:
        SkippedError: they have fewer than two different K; the message names the runs left out.
    """
    found = last_evaluations(analysis, one_base_model=True)
    pairs = [(one.num_blocks, one.evaluation) for one in found.of_runs]
    notes = list(found.notes)
    try:
        data = measure(pairs)
    except SkippedError as reason:
        raise SkippedError(" ".join([f"{reason}.", *notes]).removesuffix(".")) from None
    if data.blocks[0] > 0:
        notes.append(f"There is no run without memory: differences are to K = {data.blocks[0]}.")
    numbers = [number for number, _ in pairs]
    if twice := sorted({number for number in numbers if numbers.count(number) > 1}):
        each = ", ".join(f"K = {number}" for number in twice)
        notes.append(f"Where runs have the same K ({each}), their mean is shown.")
    return Section(
        paper=PAPER,
        findings=tuple(describe(data)),
        tables={"blocks": blocks_table(data), "runs": runs_table(pairs)},
        figures={"blocks": draw(data)},
        notes=tuple(notes),
    )


def blocks_table(data: AgainstBlocks) -> DataTable:
    """One row for each K."""
    first = data.blocks[0]
    columns = ["memory blocks K"]
    for role in ROLES:
        columns += [f"{role} loss (nats)", f"{role} difference to K = {first} (nats)"]
    columns.append("share of the largest K's rare gain (%)")
    shares = data.shares()
    rows = []
    for i, k in enumerate(data.blocks):
        cells: list[float | None] = [k]
        for role in ROLES:
            cells += [_known(data.losses[role][i]), _known(data.differences(role)[i])]
        cells.append(None if shares is None else _known(100 * shares[i]))
        rows.append(cells)
    return DataTable.of(columns, rows)


def runs_table(pairs: Sequence[tuple[int, DecileRun]]) -> DataTable:
    """One row for each run."""
    columns = ("run", "memory blocks K", "training tokens", *(f"{role} loss (nats)" for role in ROLES))
    return DataTable.of(
        columns,
        [(run.label, k, run.tokens, *(getattr(run, role) for role in ROLES)) for k, run in pairs],
    )


def describe(data: AgainstBlocks) -> list[str]:
    """Summarise the losses in sentences."""
    first, last = data.blocks[0], data.blocks[-1]
    changes = {role: data.differences(role)[-1] for role in ROLES}
    known = {role: change for role, change in changes.items() if math.isfinite(change)}
    if not known:
        return ["No group has a finite loss at both ends."]
    each = ", ".join(
        f"{role} {data.losses[role][0]:.3f} to {data.losses[role][-1]:.3f} nats ({change:+.3f})"
        for role, change in known.items()
    )
    findings = [f"From K = {first} to K = {last} the loss goes: {each}."]
    rare, common = known.get("rare", math.nan), known.get("common", math.nan)
    if rare < 0 and common < 0:
        sentence = f"The gain on rare tokens is {rare / common:.1f} times that on common ones"
        if len(data.blocks) > 2 and data.slope("common") < 0:
            steeper = data.slope("rare") / data.slope("common")
            sentence += f", and the fitted slope against K {steeper:.1f} times as steep"
        findings.append(sentence + ".")
    if rare >= 0:
        findings.append(f"K = {last} gains nothing on rare tokens, so no share of its gain is given.")
    between = list(zip(data.blocks, data.shares() or (), strict=False))[1:-1]
    if reached := [f"K = {k} {share:.0%}" for k, share in between if math.isfinite(share)]:
        findings.append(f"Of the rare gain of K = {last} there is: {', '.join(reached)}.")
    return findings


def _draw_shares(axis: Axes, blocks: Sequence[int], shares: Sequence[float]) -> None:
    known = [(k, share) for k, share in zip(blocks, shares, strict=True) if math.isfinite(share)]
    x, y = [k for k, _ in known], [100 * share for _, share in known]
    axis.plot(x, y, marker=line(0).marker, color=line(0).colour)
    for k, share in known:
        axis.annotate(
            f"{share:.0%}",
            (k, 100 * share),
            xytext=(4, -10),
            textcoords="offset points",
            ha="left",
            fontsize=8,
        )
    axis.axhline(100, color="black", linewidth=0.8, linestyle=":", zorder=0)
    axis.margins(y=0.12)
    label(axis, f"Rare gain of K = {blocks[-1]} reached", "memory blocks K", "share of the gain (%)")


def _mean(losses: Sequence[float | None]) -> float:
    known = [math.nan if loss is None else loss for loss in losses]
    return sum(known) / len(known)


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
