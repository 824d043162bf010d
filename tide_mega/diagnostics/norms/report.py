"""l2 norms of embedding rows by frequency (paper, Figure 1), and those of the memory's tables beside them."""

from collections.abc import Sequence

import numpy as np

from tide_mega.diagnostics.analysis import Analysis
from tide_mega.diagnostics.norms.growth import measure_order
from tide_mega.diagnostics.norms.measure import RunNorms, measure_run
from tide_mega.diagnostics.norms.plots import MOST_INTERVALS, draw_distributions, draw_growth, draw_means
from tide_mega.diagnostics.section import Cell, DataTable, Section
from tide_mega.diagnostics.type_groups import DECILE_SLOTS, ROLE_OF


def run(analysis: Analysis) -> Section:
    """Show norms per decile, their distributions and their growth, for every run."""
    found = [measure_run(of) for of in analysis.runs]
    figures = {"means": draw_means(found), "distributions": draw_distributions(found)}
    tables = {"means": _means_table(found), "distributions": _distributions_table(found)}
    if grown := [of for of in found if of.growth.intervals]:
        figures["growth"] = draw_growth(grown)
        tables["growth"] = _growth_table(grown)
    if with_memory := [of for of in found if of.tables_FK is not None]:
        tables["memory_tables"] = _memory_table(with_memory)
    return Section(
        paper="The base model's mean norm rises from the rarest decile to the commonest; rare rows are "
        "spread widely, common ones narrowly; and with training rare norms decline while common ones keep "
        "growing.",
        findings=tuple(sentence for of in found for sentence in _findings(of)),
        tables=tables,
        figures=figures,
        notes=_notes(analysis, found),
    )


def _findings(of: RunNorms) -> list[str]:
    filled = np.flatnonzero(np.isfinite(of.means_F))
    if not len(filled):
        return [f"{of.label}: no type lies in a decile."]
    rarest, commonest = filled[[0, -1]]
    lines = [
        f"{of.label}: the mean norm of E's rows {of.order.verb} with frequency, from {of.means_F[rarest]:.3f} in "
        f"the rarest decile to {of.means_F[commonest]:.3f} in the commonest ({of.order}); rows start at about "
        f"{of.initial:.3f}."
    ]
    if of.growth.intervals:
        lines.append(describe_growth(of, rarest, commonest))
    if of.tables_FK is not None:
        mean_F = of.tables_FK.mean(1)
        low, high = (
            f"{mean_F[b]:.3f} ({of.tables_FK[b].min():.3f} to {of.tables_FK[b].max():.3f})"
            for b in (rarest, commonest)
        )
        order = measure_order(mean_F)
        lines.append(
            f"{of.label}: the mean norm of the {of.tables_FK.shape[1]} memory tables' rows {order.verb}, from "
            f"{low} to {high}, in brackets the range over blocks ({order})."
        )
    return lines


def describe_growth(of: RunNorms, rarest: int, commonest: int) -> str:
    """Say how two deciles' mean norms changed in the first and in the last interval."""
    first_F, last_F = of.growth.rate_CF[0], of.growth.rate_CF[-1]
    rare, common = f"{first_F[rarest]:+.3g}", f"{first_F[commonest]:+.3g}"
    if of.growth.intervals > 1:
        rare += f" between the first two checkpoints and {last_F[rarest]:+.3g} between the last two"
        common += f" and {last_F[commonest]:+.3g}"
    else:
        rare += " between the two checkpoints"
    return (
        f"{of.label}: per {of.growth.unit_name} tokens the rarest decile's mean norm changed by {rare}, the "
        f"commonest's by {common}."
    )


def _means_table(found: Sequence[RunNorms]) -> DataTable:
    columns = ("run", "decile", "role", "types", "mean norm of E's rows (l2)", "standard deviation (l2)")
    rows = [
        (of.label, slot, ROLE_OF.get(slot, ""), norms.types, norms.mean, norms.std)
        for of in found
        for slot, norms in of.embedding.items()
    ]
    return DataTable.of(columns, rows)


def _memory_table(found: Sequence[RunNorms]) -> DataTable:
    columns = ("run", "block", "decile", "mean norm of E_k's rows (l2)")
    rows = [
        (of.label, k + 1, slot, _cell(of.tables_FK[b, k]))
        for of in found
        if of.tables_FK is not None
        for k in range(of.tables_FK.shape[1])
        for b, slot in enumerate(DECILE_SLOTS)
    ]
    return DataTable.of(columns, rows)


def _distributions_table(found: Sequence[RunNorms]) -> DataTable:
    columns = ("run", "from norm (l2)", "to norm (l2)", *(f"{role} (density)" for role in found[0].density))
    rows: list[tuple[Cell, ...]] = [
        (of.label, float(low), float(high), *(float(density[i]) for density in of.density.values()))
        for of in found
        for i, (low, high) in enumerate(zip(of.edges[:-1], of.edges[1:], strict=True))
    ]
    return DataTable.of(columns, rows)


def _growth_table(found: Sequence[RunNorms]) -> DataTable:
    columns = ("run", "from (tokens)", "to (tokens)", "decile", "change of mean norm", "per (tokens)")
    rows: list[tuple[Cell, ...]] = []
    for of in found:
        spans = zip(of.growth.tokens_C[:-1], of.growth.tokens_C[1:], of.growth.rate_CF, strict=True)
        for first, last, rate_F in spans:
            rows += [
                (of.label, first, last, slot, _cell(rate), of.growth.unit)
                for slot, rate in zip(DECILE_SLOTS, rate_F, strict=True)
            ]
    return DataTable.of(columns, rows)


def _cell(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _notes(analysis: Analysis, found: Sequence[RunNorms]) -> tuple[str, ...]:
    notes = ["Types outside the deciles (dropped, unseen) are listed in the table and are in no decile."]
    if single := [of.label for of in found if not of.growth.intervals]:
        notes.append(
            f"{', '.join(single)}: growth needs two checkpoints (checkpoint.keep_every keeps them), and "
            "there is one."
        )
    if any(of.growth.intervals > MOST_INTERVALS for of in found):
        notes.append(
            f"The figure of growth joins neighbouring checkpoints to {MOST_INTERVALS} intervals; the table "
            "has all."
        )
    if tied := [of.label for of in analysis.runs if of.config.model.tie_embeddings]:
        notes.append(
            f"{', '.join(tied)}: the input embedding is the output layer too, so its rows also get the output's "
            "gradients, in every step. These push rows of types that seldom occur away from the hidden "
            "states and can make their norms the largest; rows of the memory's tables get the input's "
            "gradients alone."
        )
    return tuple(notes)
