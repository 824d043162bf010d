"""Contextual collapse: distances between hidden states of similar tokens, by layer (paper, Figures 2 and 6).

Distances are taken between the hidden states of two tokens in the same place of the same sentence, and shown as
heat maps of pair by layer (Figure 2) and as lines with their difference from the baseline (Figure 6).

Shapes: L layers, W words, D width, P pairs, R sequences, S tokens up to and including the slot.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from tide_mega.data.frequency import BIN_GROUPS, DROPPED, UNSEEN
from tide_mega.lab import plotting
from tide_mega.lab.figures.analysis import Analysis, SkippedError
from tide_mega.lab.figures.section import Cell, DataTable, Section
from tide_mega.lab.figures.separation_pairs import (
    CATEGORIES,
    DOMAIN_SYNONYMS,
    SAMPLED,
    SLOT,
    ChosenPairs,
    Verdict,
    choose_pairs,
    sampled_rare_pairs,
)
from tide_mega.lab.plotting import Line
from tide_mega.trained.model import TrainedModel
from tide_mega.trained.run import TrainedRun

TOKENS_PER_SEQUENCE = 128
"""Token budget of a forward pass per sequence of `sequences`; short sentences are batched to fill it."""


@dataclass(frozen=True)
class Separation:
    """Distances in one category and one model."""

    distance_PL: NDArray[np.float64]
    """Mean |h_u - h_v| over the templates."""
    norm_L: NDArray[np.float64]
    """Mean |h| over words and templates."""
    templates: int

    @property
    def mean_L(self) -> NDArray[np.float64]:
        """Mean over the pairs."""
        return self.distance_PL.mean(0)

    @property
    def relative_L(self) -> NDArray[np.float64]:
        """The same, relative to the mean norm of the layer's states, which differs between models."""
        return self.mean_L / np.maximum(self.norm_L, np.finfo(np.float64).tiny)


def measure_separation(states: Iterable[Tensor], pairs: list[tuple[int, int]]) -> Separation:
    """Average the distances over templates.

    Args:
        states: for each template, the hidden states h [L, W, D] of the words in the slot.
        pairs: indices of two of the W words each.

    Raises:
        ValueError: there is no template or no pair.
    """
    index_2P = torch.tensor(pairs).T
    distances, norms = [], []
    for h_LWD in states:
        h_LWD = h_LWD.double()
        first_P, second_P = index_2P.to(h_LWD.device)
        distances.append((h_LWD[:, first_P] - h_LWD[:, second_P]).norm(dim=-1).T.cpu())
        norms.append(h_LWD.norm(dim=-1).mean(1).cpu())
    if not distances or not pairs:
        raise ValueError(f"{len(pairs)} pairs in {len(distances)} templates: there is nothing to average")
    return Separation(
        torch.stack(distances).mean(0).numpy(), torch.stack(norms).mean(0).numpy(), len(distances)
    )


def slot_states(
    look: Callable[[Tensor], Tensor], chosen: ChosenPairs, templates: int, start_id: int, sequences: int
) -> Iterator[Tensor]:
    """Yield the states [L, W, D] of the category's words in the slot of each template.

    Sentences end at the slot, since no layer sees what follows. Each begins with `start_id`, like a document.

    Args:
        look: from tokens [R, S] to the hidden states [L, R, S, D].
        chosen: words and contexts.
        templates: how many of them.
        start_id: the end-of-document token.
        sequences: a forward pass holds at most this many times `TOKENS_PER_SEQUENCE` tokens.
    """
    words = torch.from_numpy(chosen.ids_W)
    by_length: dict[int, list[NDArray[np.int64]]] = {}
    for context in chosen.contexts[:templates]:
        by_length.setdefault(len(context), []).append(context)
    for length, contexts in by_length.items():
        rows = max(1, sequences * TOKENS_PER_SEQUENCE // (length + 2))
        together = max(1, rows // len(words))
        for first in range(0, len(contexts), together):
            few = torch.from_numpy(np.stack(contexts[first : first + together]))
            tokens_RS = torch.cat(
                [
                    torch.full((len(few) * len(words), 1), start_id),
                    few.repeat_interleave(len(words), 0),
                    words.repeat(len(few))[:, None],
                ],
                dim=1,
            )
            last_LRD = torch.cat([look(part)[:, :, -1].cpu() for part in tokens_RS.split(rows)], dim=1)
            yield from last_LRD.split(len(words), dim=1)


Results = Mapping[str, Mapping[str, Separation]]
"""By the run's label, and in it by category."""


def mean_distances(results: Results) -> DataTable:
    """Table of the means over the pairs of a category."""
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
    """Table of every pair, averaged over the templates."""
    rows = [
        (pairs.category, name, label, layer, distance)
        for label, by_category in results.items()
        for pairs in chosen
        for name, of_pair in zip(pairs.names, by_category[pairs.category].distance_PL.tolist(), strict=True)
        for layer, distance in enumerate(of_pair)
    ]
    return DataTable.of(("category", "pair", "run", "layer", "mean l2 distance"), rows)


def pair_verdicts(considered: Sequence[ChosenPairs], run: TrainedRun) -> DataTable:
    """Table of the pairs measured, and why others were not."""
    rows = [_verdict(pairs.category, verdict, run) for pairs in considered for verdict in pairs.verdicts]
    columns = ("category", "first", "second", "status", "reason", "decile of first", "decile of second")
    return DataTable.of(columns, rows)


def sentences(chosen: Sequence[ChosenPairs], templates: int) -> DataTable:
    """Table of the templates, with their slot."""
    rows = [(pairs.category, one.sentence(SLOT)) for pairs in chosen for one in pairs.templates[:templates]]
    return DataTable.of(("category", "sentence"), rows)


def _verdict(category: str, verdict: Verdict, run: TrainedRun) -> tuple[Cell, ...]:
    deciles: list[Cell] = [_decile(int(run.bins[index])) for index in verdict.ids or ()]
    return (category, *verdict.pair, verdict.status, verdict.reason, *(deciles or (None, None)))


def _decile(number: int) -> str:
    return {DROPPED: "dropped", UNSEEN: "unseen"}.get(number, str(number))


_MOST_TICKS = 14
_DISTANCE = "mean l2 distance"

Measured = Mapping[str, Mapping[str, Separation]]
"""By the run's label, and in it by category."""


def draw_lines(runs: Measured, looks: Mapping[str, Line], base: str | None, *, relative: bool) -> Figure:
    """Draw the mean distance of every category by layer and, below, its difference from the baseline.

    Args:
        runs: the measurements.
        looks: by run.
        base: label of the baseline; without it, or without another run, the lower row is left out.
        relative: show distances relative to the states' mean norm.
    """
    categories = list(next(iter(runs.values())))
    compared = base if base is not None and len(runs) > 1 else None
    figure, axes = plotting.panels(len(categories), 1 if compared is None else 2, height=3.4)
    y = "mean distance / mean norm" if relative else f"{_DISTANCE} ‖hᵤ \N{MINUS SIGN} hᵥ‖"
    for column, category in enumerate(categories):
        curves_L = {
            label: of[category].relative_L if relative else of[category].mean_L for label, of in runs.items()
        }
        _lines(axes[0, column], curves_L, looks)
        plotting.label(axes[0, column], category, "layer", y if column == 0 else "")
        axes[0, column].set_ylim(bottom=0)
        if compared is not None:
            axis = axes[1, column]
            gains_L = {
                label: curve - curves_L[compared] for label, curve in curves_L.items() if label != compared
            }
            axis.axhline(0, color=plotting.GREY, linestyle="--", linewidth=1)
            _lines(axis, gains_L, looks)
            plotting.label(axis, "", "layer", f"difference from {compared}" if column == 0 else "")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False)
    return figure


def draw_heat(runs: Measured, pairs: Mapping[str, Sequence[str]], base: str | None) -> Figure:
    """Draw pair by layer: a row of panels per run, and one for the last run's difference from the baseline.

    Args:
        runs: the measurements.
        pairs: names of each category's pairs.
        base: label of the run that the last one is compared with, if any.
    """
    categories, last = list(pairs), list(runs)[-1]
    most = max(len(names) for names in pairs.values())
    rows = len(runs) + (base is not None)
    figure, axes = plotting.panels(len(categories), rows, height=max(2.6, 1.0 + 0.2 * most))
    for column, category in enumerate(categories):
        panels_PL = {label: of[category].distance_PL for label, of in runs.items()}
        top = max(float(values.max()) for values in panels_PL.values())
        for row, (label, values_PL) in enumerate(panels_PL.items()):
            _heat(axes[row, column], values_PL, pairs[category], f"{label}: {category}", (0.0, top))
        if base is not None:
            gain_PL = panels_PL[last] - panels_PL[base]
            reach = float(np.abs(gain_PL).max())
            title = f"{last} minus {base}: {category}"
            _heat(axes[-1, column], gain_PL, pairs[category], title, (-reach, reach))
    return figure


def _lines(axis: Axes, curves_L: Mapping[str, NDArray[np.float64]], looks: Mapping[str, Line]) -> None:
    for label, values_L in curves_L.items():
        look = looks[label]
        axis.plot(
            range(len(values_L)), values_L, look.dash, marker=look.marker, color=look.colour, label=label
        )
    _layer_ticks(axis, max(len(values_L) for values_L in curves_L.values()))


def _heat(
    axis: Axes,
    values_PL: NDArray[np.float64],
    names: Sequence[str],
    title: str,
    bounds: tuple[float, float],
) -> None:
    low, high = bounds
    image = axis.imshow(
        values_PL,
        aspect="auto",
        cmap=plotting.DIVERGING if low < 0 else plotting.HEAT,
        vmin=low,
        vmax=high or 1.0,
        interpolation="nearest",
    )
    bar = axis.figure.colorbar(image, ax=axis, pad=0.02)
    bar.set_label("difference of distance" if low < 0 else _DISTANCE, fontsize=8)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("layer")
    axis.set_yticks(range(len(names)), names, fontsize=7)
    _layer_ticks(axis, values_PL.shape[1])


def _layer_ticks(axis: Axes, layers: int) -> None:
    """Put ticks at whole layers, at a few if there are many."""
    axis.set_xticks(range(0, layers, math.ceil(layers / _MOST_TICKS)))


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
            "mean_distances": mean_distances(results),
            "pairs": pair_verdicts(considered, first),
            "distances": pair_distances(results, chosen),
            "templates": sentences(chosen, analysis.options.templates),
        },
        figures=_figures(analysis, results, chosen),
        notes=tuple(_notes(considered, analysis.options.templates)),
    )


def _considered(first: TrainedRun, seed: int) -> list[ChosenPairs]:
    """Return the three categories, with rare pairs of the tokenizer's own if it has none of the listed."""
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


def _findings(results: Results, base: str | None, considered: Sequence[ChosenPairs]) -> list[str]:
    """Describe the baseline's trend in each category, and that of the run with the largest memory."""
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


def _figures(analysis: Analysis, results: Results, chosen: Sequence[ChosenPairs]) -> dict[str, Figure]:
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
