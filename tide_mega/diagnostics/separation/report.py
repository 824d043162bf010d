"""The section: which pairs, their distances in every run, and what differs.

Shapes: L layers, R sequences, S tokens.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from tide_mega.data.frequency import BIN_GROUPS
from tide_mega.diagnostics.analysis import Analysis, SkippedError
from tide_mega.diagnostics.section import Section
from tide_mega.diagnostics.separation import tables
from tide_mega.diagnostics.separation.categories import CATEGORIES, DOMAIN_SYNONYMS
from tide_mega.diagnostics.separation.measure import Separation, measure_separation, slot_states
from tide_mega.diagnostics.separation.pairs import (
    SAMPLED,
    ChosenPairs,
    choose_pairs,
    sampled_rare_pairs,
)
from tide_mega.diagnostics.separation.plot import draw_heat, draw_lines
from tide_mega.trained.model import TrainedModel
from tide_mega.trained.run import TrainedRun


def run(analysis: Analysis) -> Section:
    """Measure how far apart token pairs are in template sentences, in every run.

    Raises:
        SkippedError: no pair of any category consists of single tokens.
    """
    first = analysis.runs[0]
    considered = _considered(first, analysis.options.seed)
    chosen = [pairs for pairs in considered if pairs.measured]
    if not chosen:
        raise SkippedError("it needs pairs of single tokens, and this tokenizer has none of those listed")
    results = {opened.label: _measure(analysis.model(opened), chosen, analysis) for opened in analysis.runs}
    base = None if analysis.base is None else analysis.base.label
    return Section(
        paper=(
            "In the 1B baseline the mean l2 distance stays near zero through most of the depth and grows in the "
            "last layers, least for numerals (Figure 2). TIDE's is larger, most from the middle to the last "
            "layers, and most for numerals (Figure 6). 150 template sentences."
        ),
        findings=(*_findings(results, base, considered), *_rarity(considered, first)),
        tables={
            "mean_distances": tables.mean_distances(results),
            "pairs": tables.pair_verdicts(considered, first),
            "distances": tables.pair_distances(results, chosen),
            "templates": tables.sentences(chosen, analysis.options.templates),
        },
        figures=_figures(analysis, results, chosen),
        notes=tuple(_notes(considered, analysis.options.templates)),
    )


def _considered(first: TrainedRun, seed: int) -> list[ChosenPairs]:
    """The three categories, and rare pairs of the tokenizer itself where it has none of the listed."""
    judged = [choose_pairs(category, first.tokenizer) for category in CATEGORIES]
    if not judged[-1].measured:
        sampled = sampled_rare_pairs(first.tokenizer, first.bins, seed, DOMAIN_SYNONYMS.templates)
        judged.append(choose_pairs(sampled, first.tokenizer))
    return judged


def _measure(model: TrainedModel, chosen: Sequence[ChosenPairs], analysis: Analysis) -> dict[str, Separation]:
    start, options = model.run.tokenizer.eos_id, analysis.options
    return {
        pairs.category: measure_separation(
            slot_states(
                lambda tokens_RS: model.look_inside(tokens_RS).hidden_LBTD,
                pairs,
                templates=options.templates,
                start_id=start,
                sequences=options.batch,
            ),
            pairs.columns,
        )
        for pairs in chosen
    }


def _findings(results: tables.Results, base: str | None, considered: Sequence[ChosenPairs]) -> list[str]:
    """The baseline's course in each category, and that of the run with the largest memory."""
    most = list(results)[-1]
    found = []
    for pairs in considered:
        name = pairs.category
        if not pairs.measured:
            found.append(
                f"{name}: nothing is measured, no pair's sentences differ in the word's token alone."
            )
            continue
        for label in dict.fromkeys((base or most, most)):
            text = f"{name}, {label}: {_course(results[label][name])}"
            if base is not None and label != base:
                text += _compared(results[label][name], results[base][name], base)
            found.append(f"{text}.")
    for label in dict.fromkeys((base or most, most)):
        last = {name: of.relative_L[-1] for name, of in results[label].items()}
        closest = min(last, key=lambda name: last[name])
        if len(last) > 1:
            found.append(
                f"After the last layer of {label} the pairs closest by part of the norm are {closest}."
            )
    return found


def _course(of: Separation) -> str:
    last = len(of.mean_L) - 1
    return (
        f"mean distance {of.mean_L[0]:.3g} after layer 0 and {of.mean_L[last]:.3g} after layer {last}, "
        f"which is {of.relative_L[0]:.0%} and {of.relative_L[last]:.0%} of the states' mean norm"
    )


def _compared(of: Separation, base: Separation, label: str) -> str:
    if len(of.mean_L) != len(base.mean_L):
        return f"; {label} has another number of layers and is not compared"
    gain_L = of.mean_L - base.mean_L
    most = int(gain_L.argmax())
    points_L = 100 * (of.relative_L - base.relative_L)
    return (
        f"; farther apart than in {label} in {int((gain_L > 0).sum())} of {len(gain_L)} layers, the difference "
        f"highest in layer {most} ({gain_L[most]:+.3g}); by the part of the norm in {int((points_L > 0).sum())} "
        f"({points_L.mean():+.1f} percentage points, mean over layers)"
    )


def _rarity(considered: Sequence[ChosenPairs], first: TrainedRun) -> list[str]:
    listed = next(pairs for pairs in considered if pairs.category == DOMAIN_SYNONYMS.name)
    if not listed.measured:
        return []
    rare = int(np.isin(first.bins[listed.ids_W], list(BIN_GROUPS["rare"])).sum())
    return [
        f"Of the {len(listed.ids_W)} words of {listed.category}, {rare} are of the corpus's rare deciles 0-2."
    ]


def _figures(analysis: Analysis, results: tables.Results, chosen: Sequence[ChosenPairs]) -> dict[str, Figure]:
    looks = analysis.looks
    base = None if analysis.base is None else analysis.base.label
    if len({run.config.model.num_layers for run in analysis.runs}) > 1:
        base = None
    figures = {
        "by_layer": draw_lines(results, looks, base, relative=False),
        "by_layer_relative": draw_lines(results, looks, base, relative=True),
    }
    names = {pairs.category: pairs.names for pairs in chosen}
    for label in [label for label in results if label != base] or list(results):
        shown = {one: results[one] for one in (base, label) if one is not None}
        others = base if len(shown) == 2 else None
        figures[f"pairs_{len(figures) - 1}"] = draw_heat(shown, names, others)
    return figures


def _notes(considered: Sequence[ChosenPairs], templates: int) -> list[str]:
    count = min(templates, *(len(pairs.templates) for pairs in considered))
    notes = [
        f"{count} sentences for each category, each with another text before the slot; the states are those at "
        "the differing token, after each layer and before the final norm. Text after the slot cannot change them "
        "and is not run.",
        "A larger distance may come from larger states alone: the part of the mean norm is free of that.",
    ]
    dropped = {
        pairs.category: sum(verdict.status == "dropped" for verdict in pairs.verdicts) for pairs in considered
    }
    notes += [
        f"{category}: {number} pairs were dropped, as their sentences do not differ in one token alone, the word "
        "itself (reasons in table pairs)."
        for category, number in dropped.items()
        if number
    ]
    if any(pairs.category == SAMPLED and pairs.measured for pairs in considered):
        notes.append(
            f"The {SAMPLED} stand in for rare domain synonyms: rare tokens of this tokenizer that share their "
            "last three letters. They are no synonyms, and in these sentences they make no sense."
        )
    return notes
