"""The separation's data, row by row."""

from collections.abc import Mapping, Sequence

from tide_mega.data.frequency import DROPPED, UNSEEN
from tide_mega.diagnostics.section import Cell, DataTable
from tide_mega.diagnostics.separation.measure import Separation
from tide_mega.diagnostics.separation.pairs import ChosenPairs, Verdict
from tide_mega.diagnostics.separation.templates import SLOT
from tide_mega.trained.run import TrainedRun

Results = Mapping[str, Mapping[str, Separation]]
"""By the run's label, and in it by category."""


def mean_distances(results: Results) -> DataTable:
    """Means over the pairs of a category."""
    rows = [
        (category, label, layer, *values)
        for label, by_category in results.items()
        for category, of in by_category.items()
        for layer, values in enumerate(
            zip(of.mean_L.tolist(), of.norm_L.tolist(), of.relative_L.tolist(), strict=True)
        )
    ]
    columns = ("category", "run", "layer", "mean l2 distance", "mean l2 norm of h", "distance / norm")
    return DataTable.of(columns, rows)


def pair_distances(results: Results, chosen: Sequence[ChosenPairs]) -> DataTable:
    """Of each pair, averaged over the templates."""
    rows = [
        (pairs.category, name, label, layer, distance)
        for label, by_category in results.items()
        for pairs in chosen
        for name, of_pair in zip(pairs.names, by_category[pairs.category].distance_PL.tolist(), strict=True)
        for layer, distance in enumerate(of_pair)
    ]
    return DataTable.of(("category", "pair", "run", "layer", "mean l2 distance"), rows)


def pair_verdicts(considered: Sequence[ChosenPairs], run: TrainedRun) -> DataTable:
    """Which pairs were measured, and why others were not."""
    rows = [_verdict(pairs.category, verdict, run) for pairs in considered for verdict in pairs.verdicts]
    columns = ("category", "first", "second", "status", "reason", "decile of first", "decile of second")
    return DataTable.of(columns, rows)


def sentences(chosen: Sequence[ChosenPairs], templates: int) -> DataTable:
    """The templates, with their slot."""
    rows = [(pairs.category, one.sentence(SLOT)) for pairs in chosen for one in pairs.templates[:templates]]
    return DataTable.of(("category", "sentence"), rows)


def _verdict(category: str, verdict: Verdict, run: TrainedRun) -> tuple[Cell, ...]:
    deciles: list[Cell] = [_decile(int(run.bins[index])) for index in verdict.ids or ()]
    return (category, *verdict.pair, verdict.status, verdict.reason, *(deciles or (None, None)))


def _decile(number: int) -> str:
    return {DROPPED: "dropped", UNSEEN: "unseen"}.get(number, str(number))
