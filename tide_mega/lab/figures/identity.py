"""Proposition 3.3: the memory tells any two tokens apart (paper, section 3.3.3, appendix G).

Measured: how far apart token types are in the same context, as feed-forward layers see them and in the memory.

Constructed: rows at a given distance after a MemoryBlock's norm. M(x) = g x / sqrt(mean(x²) + eps) lies in the
ellipsoid sum (M_i / g_i)² < D, whose axes are 2 sqrt(D) |g_i| long; rows approach its surface as they grow large
against eps. With fixed gains, two rows can therefore have any distance from 0 up to the longest axis, exclusive.

Shapes: C contexts, N token types or distances asked for, B sequences, T tokens, P pairs, L layers, K blocks, J = K
+ 1, D width.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from tide_mega.kernels.row_norm import row_norm
from tide_mega.lab.figures.analysis import Analysis, SkippedError
from tide_mega.lab.figures.kit import by_run
from tide_mega.lab.figures.null_bound import normalised_rows
from tide_mega.lab.figures.section import Cell, DataTable, Section
from tide_mega.lab.plotting import Line, label, line, panels
from tide_mega.model.canonical import GAINS
from tide_mega.trained.model import TrainedModel
from tide_mega.trained.run import TrainedRun


@dataclass(frozen=True, eq=False)
class Seen:
    """A model's activations for types that each end the same context; fp32, on the CPU."""

    inputs_LND: Tensor
    """ñ, the input of the feed-forward layer."""
    outputs_LND: Tensor
    injected_LND: Tensor
    """m, what the memory adds beside it."""


@dataclass(frozen=True, eq=False)
class PairDistances:
    """l2 distances of pairs at one layer, mean over contexts; float64."""

    layer: int
    pairs_P2: np.ndarray
    """Indices into the list of types."""
    inputs_P: np.ndarray
    outputs_P: np.ndarray
    injected_P: np.ndarray
    rows_PK: np.ndarray
    """Between the memory rows M_k, which do not depend on context."""

    def only(self, chosen: np.ndarray) -> "PairDistances":
        """Return some of the pairs."""
        return PairDistances(
            self.layer,
            self.pairs_P2[chosen],
            self.inputs_P[chosen],
            self.outputs_P[chosen],
            self.injected_P[chosen],
            self.rows_PK[chosen],
        )


def look(model: TrainedModel, context_T: Tensor, ids_N: Tensor, batch: int) -> Seen:
    """Run every type after a context, `batch` at a time, and record the last position."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    for ids in ids_N.split(batch):
        tokens_BT = torch.cat([context_T.expand(len(ids), -1), ids[:, None]], dim=1).to(
            model.device.torch_device
        )
        with _feed_forward(model) as watched:
            alpha_LBTJ = model.look_inside(tokens_BT).alpha_LBTJ
        if alpha_LBTJ is None:
            raise ValueError(f"{model.run.label} has no memory to look at")
        distinct_U, index_B = torch.unique(tokens_BT[:, -1], return_inverse=True)
        memory_BKD = normalised_rows(model, distinct_U)[index_B]
        injected_LBD = torch.einsum("lbk,bkd->lbd", alpha_LBTJ[:, :, -1, :-1].float(), memory_BKD)
        inputs, outputs = (torch.stack(side).float().cpu() for side in zip(*watched, strict=True))
        seen.append((inputs, outputs, injected_LBD.cpu()))
    return Seen(*(torch.cat(part, dim=1) for part in zip(*seen, strict=True)))


def closest_layer(seen: list[Seen]) -> int:
    """Return the layer with the closest feed-forward inputs: least median distance over median norm."""
    inputs_CLND = torch.stack([one.inputs_LND for one in seen]).double()
    L = inputs_CLND.size(1)
    upper = np.triu_indices(inputs_CLND.size(2), 1)
    relative = [
        float(_distances(inputs_CLND[:, i])[upper].median() / inputs_CLND[:, i].norm(dim=-1).median())
        for i in range(L)
    ]
    return relative.index(min(relative))


def measure_pairs(seen: list[Seen], rows_NKD: Tensor, layer: int) -> PairDistances:
    """Measure all pairs of types at a layer; `rows_NKD` are their normalised memory rows."""
    upper = np.triu_indices(rows_NKD.size(0), 1)

    def of(side: list[Tensor]) -> np.ndarray:
        return _distances(torch.stack(side).double())[upper].numpy()

    of_rows_K = [
        _distances(rows_NKD[None, :, k].double().cpu())[upper].numpy() for k in range(rows_NKD.size(1))
    ]
    return PairDistances(
        layer,
        np.stack(upper, axis=1),
        of([one.inputs_LND[layer] for one in seen]),
        of([one.outputs_LND[layer] for one in seen]),
        of([one.injected_LND[layer] for one in seen]),
        np.stack(of_rows_K, axis=1),
    )


def steepest(seen: list[Seen], layer: int) -> float:
    """Return the largest ratio of output to input distance, over all pairs in each single context.

    Pairs whose inputs and outputs both coincide count as 0.
    """
    inputs_CNN, outputs_CNN = (
        _distances_of_each(torch.stack(side).double())
        for side in ([one.inputs_LND[layer] for one in seen], [one.outputs_LND[layer] for one in seen])
    )
    is_apart_CNN = (inputs_CNN != 0) | (outputs_CNN != 0)
    return float(torch.where(is_apart_CNN, outputs_CNN / inputs_CNN, 0.0).max())


def _distances(points_CND: Tensor) -> Tensor:
    """Distance [N, N] of every two points, mean over contexts."""
    return _distances_of_each(points_CND).mean(0)


def _distances_of_each(points_CND: Tensor) -> Tensor:
    """Distance [C, N, N] of every two points."""
    # By differences, not matrix products: those lose precision for pairs that nearly coincide.
    return torch.cdist(points_CND, points_CND, compute_mode="donot_use_mm_for_euclid_dist")


@contextmanager
def _feed_forward(model: TrainedModel) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Context that collects input and output [B, D] of every feed-forward layer at the last position."""
    watched: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, arguments: tuple[Tensor, ...], output: tuple[Tensor, Tensor | None]) -> None:
        watched.append((arguments[0][-1], output[0][-1]))

    hooks = [layer.mlp.register_forward_hook(keep) for layer in model.stage.transformers[0].decoder.layers]
    try:
        yield watched
    finally:
        for hook in hooks:
            hook.remove()


TARGETS = (1e-4, 1e-2, 0.1, 0.5, 0.9, 0.999)
"""Requested distances, as fractions of the limit."""
ALLOWED = 1e-5
"""Relative deviation of an achieved distance from the requested one."""
_ROOT_MEAN_SQUARE = 1024.0
"""Of the constructed rows: beside its square the norm's eps vanishes in fp32."""
_HALVINGS = 60


@dataclass(frozen=True, eq=False)
class Reached:
    """Distances requested and achieved, for each target and block of a model [N, K]."""

    limit_K: Tensor
    asked_NK: Tensor
    made_NK: Tensor

    @property
    def deviation(self) -> float:
        """The largest relative deviation."""
        return float((self.made_NK / self.asked_NK - 1).abs().max())

    @property
    def holds(self) -> bool:
        """Whether every distance was achieved."""
        return self.deviation <= ALLOWED


def limit(gains_KD: Tensor) -> Tensor:
    """Return the supremum [K] of distances between a block's rows, never attained: 2 sqrt(D) max |g|; fp64."""
    return 2 * math.sqrt(gains_KD.size(1)) * gains_KD.double().abs().amax(1)


def rows_apart(distances_NK: Tensor, gains_KD: Tensor, norm_eps: float) -> tuple[Tensor, Tensor]:
    """Find rows u and v [N, K, D] whose normalised rows have these distances in block k.

    Both lie on the great circle through the axes of the two largest gains, mirrored about the second: their
    components along it are equal, and the distance grows with the angle between them, which is found by bisection
    through the norm itself.

    Raises:
        ValueError: a distance is negative, or not below the block's `limit`, or D is 1.
    """
    if gains_KD.size(1) < 2:
        raise ValueError("rows of width 1 lie on no circle")
    most_K = limit(gains_KD)
    if bool((distances_NK < 0).any()) or bool((distances_NK >= most_K).any()):
        each = ", ".join(f"{most:.4g}" for most in most_K.tolist())
        raise ValueError(f"distances must be from 0 to below 2 sqrt(D) max |gain|, here {each} of the blocks")
    low_NK = torch.zeros_like(distances_NK, dtype=torch.float64)
    high_NK = torch.full_like(low_NK, math.pi / 2)
    for _ in range(_HALVINGS):
        middle_NK = (low_NK + high_NK) / 2
        found_NK = separation(*_on_circle(middle_NK, gains_KD), gains_KD, norm_eps)
        is_less_NK = found_NK < distances_NK
        low_NK = torch.where(is_less_NK, middle_NK, low_NK)
        high_NK = torch.where(is_less_NK, high_NK, middle_NK)
    return _on_circle(high_NK, gains_KD)


def separation(u_NKD: Tensor, v_NKD: Tensor, gains_KD: Tensor, norm_eps: float) -> Tensor:
    """Return the distance [N, K] of rows after the model's norm; fp64."""
    m_u, m_v = (row_norm("naive", rows, gains_KD.float(), norm_eps).double() for rows in (u_NKD, v_NKD))
    return (m_u - m_v).norm(dim=-1)


def reach_targets(gains_KD: Tensor, norm_eps: float) -> Reached:
    """Construct rows at each of `TARGETS` and measure their distances after the model's norm."""
    most_K = limit(gains_KD)
    asked_NK = torch.tensor(TARGETS, dtype=torch.float64)[:, None] * most_K
    made_NK = separation(*rows_apart(asked_NK, gains_KD, norm_eps), gains_KD, norm_eps)
    return Reached(most_K, asked_NK, made_NK)


def _on_circle(angle_NK: Tensor, gains_KD: Tensor) -> tuple[Tensor, Tensor]:
    N, (K, D) = angle_NK.size(0), gains_KD.shape
    order_KD = gains_KD.abs().argsort(1, descending=True)
    longest_NK1 = order_KD[:, 0].expand(N, K)[..., None]
    other_NK1 = order_KD[:, 1].expand(N, K)[..., None]
    radius = _ROOT_MEAN_SQUARE * math.sqrt(D)
    sine_NK1 = (radius * angle_NK.sin()).float()[..., None]
    shared_NKD = torch.zeros(N, K, D).scatter(2, other_NK1, (radius * angle_NK.cos()).float()[..., None])
    return shared_NKD.scatter(2, longest_NK1, sine_NK1), shared_NKD.scatter(2, longest_NK1, -sine_NK1)


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
    """Contexts that the types were appended to."""
    context_tokens: int
    """Length of each context, without the type."""
    steepest: float
    """Largest ratio of output to input distance, over all pairs of types in each context."""
    closest: PairDistances
    random: PairDistances


def run(analysis: Analysis) -> Section:
    """Construct rows at given distances, and measure distances of trained rows; see `Section`."""
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
    """Sample `TYPES` types of the deciles, the same for every run; measure their closest and random pairs."""
    rng = np.random.default_rng(analysis.options.seed)
    ids = types_of(one, rng)
    model = analysis.model(one)
    ids_N = torch.from_numpy(ids)
    contexts = [tokens_T[:CONTEXT_TOKENS] for tokens_T in analysis.held_out_rows(one, CONTEXTS)]
    seen = [look(model, context_T, ids_N, analysis.options.batch * 4) for context_T in contexts]
    rows_NKD = normalised_rows(model, ids_N.to(model.device.torch_device))
    layer = closest_layer(seen)
    every = measure_pairs(seen, rows_NKD, layer)
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
        steepest=steepest(seen, layer),
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
    """Say whether the distances were achieved, and how close and random pairs differ."""
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
    """Every requested distance."""
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
    """Draw achieved against requested distances, and trained distances against those of the hidden states."""
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
