"""Proposition 3.2: K tables are K pathways for a token's gradient (paper, section 3.3.2, appendix F)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tide_mega.diagnostics.analysis import Analysis, SkippedError
from tide_mega.diagnostics.propositions.gradient_sums import GradientSums, OfDecile, by_decile
from tide_mega.diagnostics.section import DataTable, Section
from tide_mega.plotting.lines import BASELINE, legend, line
from tide_mega.plotting.style import decile_axis, label, panels
from tide_mega.trained.run import TrainedRun

PAPER = (
    "The expected squared gradient that a token's rows receive over τ steps, summed over the K tables, is at "
    "least "
    "K τ κ G²min: K times the bound of a single table. κ = 1 - (1 - f)^BT is the chance that a step has the "
    "token, and "
    "G²min the least squared gradient of a row whose token is in the step, assumed to be above 0."
)


@dataclass(frozen=True)
class Measured:
    """One run."""

    label: str
    sums: GradientSums
    deciles: list[OfDecile]


def run(analysis: Analysis) -> Section:
    """Differentiate the loss of held-out microbatches by the rows they read; see `Section`."""
    memory = [measure(analysis, one) for one in analysis.with_memory]
    base = measure(analysis, analysis.base) if analysis.base is not None else None
    if not memory[0].deciles:
        raise SkippedError("it needs held-out text with token types of a frequency decile")
    findings = [sentence for one in memory for sentence in describe(one, base)]
    findings.append(describe_steps(memory[0]))
    steps = memory[0].sums.steps
    return Section(
        name="pathways",
        shows="Proposition 3.2",
        title="Squared gradients of the tables' rows",
        paper=PAPER,
        findings=tuple(findings),
        tables={"deciles": decile_table(memory, base), "tables": table_table(memory)},
        figures={"gradients": draw(memory, base)},
        notes=(
            f"Steps are {steps} held-out microbatches of {memory[0].sums.step_tokens:,} tokens through the "
            "trained "
            "model, which stays as it is; gradients are of a microbatch's mean loss, by rows before their "
            "norm.",
            "That the total is at least K times the least table's is arithmetic; how equal the tables are, "
            "and "
            "whether every row's gradient is above 0, is measured.",
            "κ is for tokens drawn one by one: real text repeats its words, so fewer steps have a type.",
            "The input embedding's gradient is of its path into the first layer; tied output weights have "
            "another. "
            "Rows of tables pass a norm and embedding rows do not, so their gradients have different scales, "
            "and Adam "
            "divides each by its own size: a K-fold squared gradient is not a K-fold update.",
        ),
    )


def measure(analysis: Analysis, one: TrainedRun) -> Measured:
    """Take each held-out microbatch of a run as a step."""
    model = analysis.model(one)
    sums = GradientSums.zero(one.config.model.vocab_size, one.num_blocks)
    for batch in analysis.held_out(one):
        sums.add(model.row_gradients(batch))
    return Measured(one.label, sums, by_decile(sums, one.bins, one.counts))


def describe(one: Measured, base: Measured | None) -> list[str]:
    """Say whether the bound holds, whether gradients vanish, and how many pathways there are in effect."""
    sums, num_blocks = one.sums, one.sums.num_blocks
    types, wrong = int((sums.steps_V > 0).sum()), sums.below_bound()
    holds = (
        f"for each of the {types:,} token types in the steps the total over the tables is at least K times "
        "that of "
        "the least table, and K x steps x G²min"
        if not wrong
        else f"for {wrong:,} of {types:,} token types the total is LESS than the bound: the sums are wrong"
    )
    rows = num_blocks * int(sums.steps_V.sum())
    zeros = int(sums.zeros_V.sum())
    vanished = (
        f"none of {rows:,} rows, one for each table, step and token type, had a gradient of 0"
        if not zeros
        else f"{zeros:,} of {rows:,} rows, one for each table, step and token type, had a gradient of "
        "exactly 0"
    )
    findings = [f"{one.label} (K = {num_blocks}): {holds}; {vanished}."]
    pathways = sums.pathways_V[sums.steps_V > 0].nanmedian()
    sentence = (
        f"{one.label}: the total is {float(pathways):.2f} times that of the strongest table (median; 1 if "
        "one table had "
        f"all, {num_blocks} if all had the same)"
    )
    if one.deciles:
        first, last = one.deciles[0], one.deciles[-1]
        sentence += (
            f", {first.pathways:.2f} in decile {first.decile} and {last.pathways:.2f} in decile {last.decile}"
        )
    findings.append(sentence + ".")
    findings.append(_against_embedding(one, base))
    return [finding for finding in findings if finding]


def describe_steps(one: Measured) -> str:
    """Compare how often types appeared with what their frequency in training makes likely."""
    rows = [row for row in one.deciles if row.steps_expected > 0]
    each = ", ".join(f"{row.decile}: {row.steps_seen:.2f} ({row.steps_expected:.2f})" for row in rows)
    return (
        f"Steps with a token, of {one.sums.steps}, mean by decile (expected from its count in training): "
        f"{each}."
    )


def decile_table(memory: Sequence[Measured], base: Measured | None) -> DataTable:
    """One row for each run and decile."""
    columns = (
        *("run", "decile", "token types seen", "squared gradient, all tables (nats²)"),
        *("K x least table (nats²)", "median pathways (1 to K)", "input embedding (nats²)"),
        *("all tables / own embedding", "all tables / baseline's embedding", "steps seen", "steps expected"),
    )
    before = {row.decile: row.embedding for row in base.deciles} if base is not None else {}
    rows = [
        (
            *(one.label, row.decile, row.types, row.total, row.smallest, row.pathways, row.embedding),
            *(ratio(row.total, row.embedding), ratio(row.total, before.get(row.decile))),
            *(row.steps_seen, row.steps_expected),
        )
        for one in memory
        for row in one.deciles
    ]
    return DataTable.of(columns, rows)


def table_table(memory: Sequence[Measured]) -> DataTable:
    """One row for each table: its part of the squared gradient."""
    rows = []
    for one in memory:
        of_tables = one.sums.tables_VK.sum(0)
        total = float(of_tables.sum())
        rows += [(one.label, k, float(of), ratio(100 * float(of), total)) for k, of in enumerate(of_tables)]
    return DataTable.of(("run", "table", "squared gradient, all types (nats²)", "share (%)"), rows)


def ratio(value: float, to: float | None) -> float | None:
    """Divide; None where there is nothing to divide by."""
    return value / to if to else None


def draw(memory: Sequence[Measured], base: Measured | None) -> Figure:
    """Squared gradients, pathways, ratios to embeddings, and steps, by decile."""
    figure, axes = panels(2, 2, width=6.0, height=4.6)
    gradients, pathways, ratios, steps = axes.flat
    for i, one in enumerate(memory):
        look, blocks = line(i), one.sums.num_blocks
        solid = {"marker": look.marker, "color": look.colour, "markersize": 5}
        x = [row.decile for row in one.deciles]
        gradients.plot(
            x, [_positive(row.total) for row in one.deciles], label=f"{one.label}, tables", **solid
        )
        gradients.plot(x, [_positive(row.smallest) for row in one.deciles], ":", color=look.colour)
        pathways.plot(x, [row.pathways for row in one.deciles], label=f"{one.label} (K = {blocks})", **solid)
        pathways.axhline(blocks, color=look.colour, linestyle=":", linewidth=1)
        own, against = _ratios(one, base)
        ratios.plot(x, own, **solid)
        if base is not None:
            ratios.plot(x, against, "--", **solid, markerfacecolor="white")
    _generic(gradients, ":", "K x least table")
    _generic(pathways, ":", "K")
    _generic(ratios, "o-", "to its own embedding")
    if base is not None:
        _generic(ratios, "o--", f"to that of {base.label}")
        x = [row.decile for row in base.deciles]
        y = [_positive(row.embedding) for row in base.deciles]
        look = BASELINE
        gradients.plot(
            x, y, look.dash, marker=look.marker, color=look.colour, label=f"{base.label}, embedding"
        )
    first = memory[0].deciles
    x = [row.decile for row in first]
    steps.plot(x, [_positive(row.steps_seen) for row in first], "o-", color=line(0).colour, label="seen")
    expected = [_positive(row.steps_expected) for row in first]
    steps.plot(x, expected, "s--", color=line(1).colour, label="expected, steps x κ")
    for axis in (gradients, ratios, steps):
        axis.set_yscale("log")
        axis.margins(y=0.15)  # room for the names of the roles
    pathways.set_ylim(bottom=1, top=1.15 * max(one.sums.num_blocks for one in memory))
    titles = (
        (gradients, "Squared gradient of a type's rows", "sum over steps, mean over types (nats²)"),
        (pathways, "Pathways in effect", "all tables / strongest table (1 to K)"),
        (ratios, "Tables against the input embedding", "squared gradient, ratio"),
        (steps, f"Steps with a type, of {memory[0].sums.steps}", "mean over types"),
    )
    for axis, title, y_label in titles:
        decile_axis(axis, "token")
        label(axis, title, axis.get_xlabel(), y_label)
        legend(axis, inside=2 if axis is steps or axis is ratios else 0)
    return figure


def _generic(axis: Axes, form: str, text: str) -> None:
    """Name what a kind of line means, whatever its colour."""
    axis.plot([], [], form, color="black", markerfacecolor="white" if form == "o--" else None, label=text)


def _ratios(one: Measured, base: Measured | None) -> tuple[list[float], list[float]]:
    """The tables' squared gradient over the own embedding's and over the baseline's, by decile; NaN without."""
    before = {row.decile: row.embedding for row in base.deciles} if base is not None else {}
    own = [ratio(row.total, row.embedding) or math.nan for row in one.deciles]
    return own, [ratio(row.total, before.get(row.decile)) or math.nan for row in one.deciles]


def _positive(value: float) -> float:
    return value if value > 0 else math.nan


def _against_embedding(one: Measured, base: Measured | None) -> str:
    parts = []
    for row, own, other in list(zip(one.deciles, *_ratios(one, base), strict=True))[
        :: len(one.deciles) - 1 or 1
    ]:
        if math.isnan(own):
            continue
        part = f"decile {row.decile} {own:.3g} times its own"
        if base is not None and math.isfinite(other):
            part += f" and {other:.3g} times {base.label}'s"
        parts.append(part)
    return (
        f"{one.label}: all tables against the input embedding's squared gradient: {', '.join(parts)}."
        if parts
        else ""
    )
