"""Proposition 3.3: the memory tells any two tokens apart (paper, section 3.3.3, appendix G)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tide_mega.diagnostics.analysis import Analysis, SkippedError
from tide_mega.diagnostics.propositions import pairs
from tide_mega.diagnostics.propositions.by_run import by_run
from tide_mega.diagnostics.propositions.pairs import PairDistances
from tide_mega.diagnostics.propositions.reach import TARGETS, Reached, reach_targets
from tide_mega.diagnostics.propositions.routed_memory import normalised_rows
from tide_mega.diagnostics.section import Cell, DataTable, Section
from tide_mega.model.canonical import GAINS
from tide_mega.plotting.lines import Line, line
from tide_mega.plotting.style import label, panels
from tide_mega.trained.run import TrainedRun

TYPES, PAIRS = 128, 200
CONTEXTS, CONTEXT_TOKENS = 2, 15
"""At most."""

PAPER = (
    "However close two tokens' hidden states are, there are memory rows with a distance of any C > 0, "
    "because the rows "
    "are looked up by token; a feed-forward layer's outputs cannot differ by more than its Lipschitz "
    "constant times "
    "the distance of its inputs."
)


@dataclass(frozen=True, eq=False)
class Measured:
    """One run."""

    label: str
    reached: Reached
    types: int
    contexts: int
    """That the types ended."""
    context_tokens: int
    """Of each context, before the type."""
    steepest: float
    """Largest distance of outputs over that of inputs, of all pairs of types in each context."""
    closest: PairDistances
    random: PairDistances


def run(analysis: Analysis) -> Section:
    """Make rows at given distances, and measure distances of the trained ones; see `Section`."""
    results = [measure(analysis, one) for one in analysis.with_memory]
    drawn = results[-1]
    contexts = by_run({one.label: f"{one.contexts} of {one.context_tokens} tokens" for one in results})
    notes = [
        "With gains that stay as they are, normalised rows lie within an ellipsoid, so C can be anything "
        "below its "
        "longest axis, 2 sqrt(d) max |gain|, and nothing from there on; the proposition's every C > 0 needs "
        "the gains "
        "to grow too, which are the block's own but shared by all tokens.",
        "That rows at a distance exist does not say that training finds them: the trained rows' distances "
        "do.",
        f"Distances of a pair are those at its types, each put after the same held-out contexts ({contexts}), "
        "mean over contexts, at the layer where types lie closest. After the first layer the memory of the "
        "layers before has already told hidden states apart.",
    ]
    if len(results) > 1:
        notes.append(f"The figure's pairs are those of {drawn.label}.")
    return Section(
        paper=PAPER,
        findings=tuple(sentence for one in results for sentence in describe(one)),
        tables={"reach": reach_table(results), "pairs": pair_table(results, analysis.runs[0])},
        figures={"separation": draw(results, drawn, analysis.looks)},
        notes=tuple(notes),
    )


def measure(analysis: Analysis, one: TrainedRun) -> Measured:
    """Take `TYPES` types of the deciles, the same for every run, and their closest and random pairs."""
    rng = np.random.default_rng(analysis.options.seed)
    ids = types_of(one, rng)
    model = analysis.model(one)
    ids_N = torch.from_numpy(ids)
    contexts = [tokens_T[:CONTEXT_TOKENS] for tokens_T in analysis.held_out_rows(one, CONTEXTS)]
    seen = [pairs.look(model, context_T, ids_N, analysis.options.batch * 4) for context_T in contexts]
    rows_NKD = normalised_rows(model, ids_N.to(model.device.torch_device))
    layer = pairs.closest_layer(seen)
    every = pairs.measure(seen, rows_NKD, layer)
    number = min(PAIRS, len(every.inputs_P))
    closest = np.argsort(every.inputs_P, kind="stable")[:number]
    random = rng.choice(len(every.inputs_P), number, replace=False)
    reached = reach_targets(one.weights.tensor(GAINS), one.config.model.norm_eps)
    return Measured(
        label=one.label,
        reached=reached,
        types=len(ids),
        contexts=len(contexts),
        context_tokens=len(contexts[0]),
        steepest=pairs.steepest(seen, layer),
        closest=_with_ids(every.only(closest), ids),
        random=_with_ids(every.only(random), ids),
    )


def types_of(one: TrainedRun, rng: np.random.Generator) -> np.ndarray:
    """Sample types that belong to a decile, ascending.

    Raises:
        SkippedError: there are fewer than three.
    """
    known = np.flatnonzero(one.bins >= 0)
    if len(known) < 3:
        raise SkippedError("it needs token types that belong to a frequency decile")
    return np.sort(rng.choice(known, min(TYPES, len(known)), replace=False))


def describe(one: Measured) -> list[str]:
    """Say whether the distances were made, and how close and random pairs differ."""
    reached, limits = one.reached, one.reached.limit_K.tolist()
    span = (
        f"{min(limits):.2f}"
        if max(limits) - min(limits) < 0.005
        else f"{min(limits):.2f} to {max(limits):.2f}"
    )
    targets = f"from {TARGETS[0]:g} to {TARGETS[-1]:g} times the most possible ({span} with these gains)"
    first = (
        f"{one.label}: rows were found for all {reached.asked_NK.numel()} distances asked for in "
        f"{len(limits)} tables, "
        f"{targets}; after the norm they deviate from them by at most {reached.deviation:.1e}, relatively."
        if reached.holds
        else f"{one.label}: of the distances {targets} some were NOT made: they deviate by up to "
        f"{reached.deviation:.1e}, "
        "relatively."
    )
    near, far = one.closest, one.random
    sides = {
        "feed-forward inputs": (near.inputs_P, far.inputs_P),
        "feed-forward outputs": (near.outputs_P, far.outputs_P),
        "injected memory": (near.injected_P, far.injected_P),
        "memory rows": (near.rows_PK.mean(1), far.rows_PK.mean(1)),
    }
    each = ", ".join(
        f"{name} {np.median(a):.3g} against {np.median(b):.3g} ({_percent(np.median(a), np.median(b))})"
        for name, (a, b) in sides.items()
    )
    second = (
        f"{one.label}, layer {near.layer}: median distances of the {len(near.inputs_P)} closest pairs of "
        f"{one.types} types "
        f"against random ones: {each}."
    )
    where = "1 context" if one.contexts == 1 else f"each of {one.contexts} contexts"
    third = (
        f"{one.label}, layer {near.layer}: over all {one.types * (one.types - 1) // 2:,} pairs of the types, in "
        f"{where}, feed-forward outputs are up to {one.steepest:.3g} times as far apart as their inputs; the "
        f"closest pairs' memory rows are {near.rows_PK.min():.3g} to {near.rows_PK.max():.3g} apart."
    )
    return [first, second, third]


def reach_table(results: list[Measured]) -> DataTable:
    """Every distance that was asked for."""
    rows = [
        (one.label, k, float(of.limit_K[k]), float(of.asked_NK[n, k]), float(of.made_NK[n, k]))
        for one in results
        for of in [one.reached]
        for k in range(len(of.limit_K))
        for n in range(len(TARGETS))
    ]
    return DataTable.of(("run", "table", "longest axis", "distance asked for", "distance made"), rows)


def pair_table(results: list[Measured], run_of_tokens: TrainedRun) -> DataTable:
    """Every pair, with its tokens."""
    columns = (
        *(
            "run",
            "kind",
            "layer",
            "token u",
            "token v",
            "feed-forward inputs (l2)",
            "feed-forward outputs (l2)",
        ),
        *("injected memory (l2)", "memory rows, mean over tables (l2)", "memory rows, least table (l2)"),
    )
    spell = run_of_tokens.tokenizer.token_text
    rows: list[tuple[Cell, ...]] = []
    for one in results:
        for kind, of in (("closest", one.closest), ("random", one.random)):
            for i, (u, v) in enumerate(of.pairs_P2.tolist()):
                rows.append(
                    (
                        *(one.label, kind, of.layer, spell(u), spell(v)),
                        *(float(side[i]) for side in (of.inputs_P, of.outputs_P, of.injected_P)),
                        *(float(of.rows_PK[i].mean()), float(of.rows_PK[i].min())),
                    )
                )
    return DataTable.of(columns, rows)


def draw(results: list[Measured], drawn: Measured, looks: Mapping[str, Line]) -> Figure:
    """Distances made against those asked for; trained distances against those of the hidden states."""
    figure, axes = panels(2, width=6.0, height=4.6)
    made, trained = axes[0]
    for one in results:
        of, look = one.reached, looks[one.label]
        x, y = ((side / of.limit_K).flatten().tolist() for side in (of.asked_NK, of.made_NK))
        made.plot(x, y, look.marker, color=look.colour, label=one.label, markerfacecolor="none")
    made.plot(
        [TARGETS[0] / 2, 1], [TARGETS[0] / 2, 1], "-", color="black", linewidth=0.8, zorder=0, label="equal"
    )
    made.axvline(1, color="black", linestyle=":", linewidth=1, label="longest axis")
    made.set(xscale="log", yscale="log")
    label(
        made,
        "Rows made at given distances",
        "distance asked for / longest axis",
        "distance made / longest axis",
    )
    made.legend(frameon=False)
    _draw_pairs(trained, drawn)
    return figure


def _draw_pairs(axis: Axes, one: Measured) -> None:
    sides = (("feed-forward outputs", "outputs_P"), ("injected memory", "injected_P"))
    for i, (name, attribute) in enumerate(sides):
        for kind, of, face in (("random", one.random, "none"), ("closest", one.closest, line(i).colour)):
            axis.plot(
                of.inputs_P,
                getattr(of, attribute),
                line(i).marker,
                color=line(i).colour,
                markerfacecolor=face,
                markersize=3.5,
                alpha=0.7,
                label=f"{name}, {kind} pairs",
            )
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0, top=1.35 * axis.get_ylim()[1])
    title = f"Trained distances, {one.label}, layer {one.closest.layer}"
    label(axis, title, "l2 distance of feed-forward inputs", "l2 distance of what is added")
    axis.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")


def _with_ids(found: PairDistances, ids: np.ndarray) -> PairDistances:
    return PairDistances(
        found.layer, ids[found.pairs_P2], found.inputs_P, found.outputs_P, found.injected_P, found.rows_PK
    )


def _percent(part: float, of: float) -> str:
    return f"{part / of:.0%}" if of else "-"
