"""Proposition 3.2: K tables are K pathways for a token's gradient (paper, section 3.3.2, appendix F)."""

import math
from collections.abc import Sequence

from tide_mega.diagnostics.analysis import Analysis, SkippedError
from tide_mega.diagnostics.propositions.by_run import by_run
from tide_mega.diagnostics.propositions.measured_gradients import (
    Measured,
    embeddings_before,
    measure,
    ratio,
    ratios,
)
from tide_mega.diagnostics.propositions.pathways_plot import draw
from tide_mega.diagnostics.section import DataTable, Section

PAPER = (
    "The expected squared gradient that a token's rows receive over τ steps, summed over the K tables, is at "
    "least "
    "K τ κ G²min: K times the bound of a single table. κ = 1 - (1 - f)^BT is the chance that a step has the "
    "token, and "
    "G²min the least squared gradient of a row whose token is in the step, assumed to be above 0."
)


def run(analysis: Analysis) -> Section:
    """Differentiate the loss of held-out microbatches by the rows they read; see `Section`."""
    memory = [measure(analysis, one) for one in analysis.with_memory]
    base = measure(analysis, analysis.base) if analysis.base is not None else None
    if not memory[0].deciles:
        raise SkippedError("it needs held-out text with token types of a frequency decile")
    findings = [sentence for one in memory for sentence in describe(one, base)]
    findings.append(describe_steps(memory[0]))
    return Section(
        paper=PAPER,
        findings=tuple(findings),
        tables={"deciles": decile_table(memory, base), "tables": table_table(memory)},
        figures={"gradients": draw(memory, base, analysis.looks)},
        notes=(
            f"Steps are held-out microbatches of whole sequences ({sizes_of(memory)}) through the trained "
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
            *apart(memory, base),
        ),
    )


def sizes_of(memory: Sequence[Measured]) -> str:
    """Say how many steps there are, and of how many tokens; by run where these differ."""
    said = {}
    for one in memory:
        tokens = one.sums.step_tokens
        size = " to ".join(f"{n:,}" for n in sorted({min(tokens, default=0), max(tokens, default=0)}))
        said[one.label] = f"{len(tokens)} of {size} tokens"
    return by_run(said)


def apart(memory: Sequence[Measured], base: Measured | None) -> list[str]:
    """Name the runs whose sums are over other steps than the baseline's."""
    names = [one.label for one in memory if base is not None and not one.sums.is_of_the_same_text(base.sums)]
    if base is None or not names:
        return []
    return [
        f"{', '.join(names)}: the steps have other tokens, or another number of them, than those of "
        f"{base.label}, so the sums are not compared with its embedding's."
    ]


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
    rows = [
        (
            *(one.label, row.decile, row.types, row.total, row.smallest, row.pathways, row.embedding),
            *(ratio(row.total, row.embedding), ratio(row.total, before.get(row.decile))),
            *(row.steps_seen, row.steps_expected),
        )
        for one in memory
        for before in [embeddings_before(one, base)]
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


def _against_embedding(one: Measured, base: Measured | None) -> str:
    parts = []
    for row, own, other in list(zip(one.deciles, *ratios(one, base), strict=True))[
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
