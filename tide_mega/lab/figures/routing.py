"""Mean router weight of each block and the null bank, by layer and the input token's decile (paper, Figure 10).

Shapes: L layers, S slots (the ten deciles first, then dropped and unseen), K blocks, J = K + 1 banks with the null
bank last, B sequences, T tokens, N tokens of a batch, V vocabulary.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from tide_mega.data.frequency import NUM_BINS
from tide_mega.lab import plotting
from tide_mega.lab.figures.analysis import Analysis
from tide_mega.lab.figures.section import Cell, DataTable, Section
from tide_mega.lab.plotting import Line
from tide_mega.metrics.deciles import SLOTS, SlotIndex
from tide_mega.trained.run import TrainedRun

_MOST_TICKS, _MOST_NUMBERS = 14, 12
Weights = NDArray[np.float64]


def draw_null(null_LS: Mapping[str, Weights], looks: Mapping[str, Line]) -> Figure:
    """Draw the null bank's weight by decile: in the last layer, and mean over layers; one line per run."""
    figure, axes = plotting.panels(2)
    for axis, title in zip(axes[0], ("last layer", "mean over layers"), strict=True):
        plotting.decile_axis(axis, "input token")
        for label, weights_LS in null_LS.items():
            weights_S = weights_LS[-1] if title == "last layer" else weights_LS.mean(0)
            look = looks[label]
            deciles = range(NUM_BINS)
            axis.plot(
                deciles, weights_S[:NUM_BINS], look.dash, marker=look.marker, color=look.colour, label=label
            )
        axis.margins(y=0.15)
        axis.set_ylim(0, 1.12 * axis.get_ylim()[1])  # room for the names of rare, mid and common
        axis.set_title(f"Null bank, {title}")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("mean router weight (0 to 1)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False)
    return figure


def draw_one_layer(weight_SJ: Weights, label: str, layer: int) -> Figure:
    """Draw the blocks' weights by decile as a heat map, and the null bank's as bars."""
    blocks = weight_SJ.shape[1] - 1
    figure, axes = plotting.panels(2, height=max(4.2, 1.4 + 0.22 * blocks), width=6)
    heat, bars = axes[0]
    _heat(heat, weight_SJ[:NUM_BINS, :-1].T, "mean router weight")
    heat.set_yticks(range(blocks), [f"block {k}" for k in range(1, blocks + 1)], fontsize=8)
    _decile_columns(heat)
    heat.set_title(f"{label}: blocks, layer {layer}")
    plotting.decile_axis(bars, "input token")
    drawn = bars.bar(range(NUM_BINS), weight_SJ[:NUM_BINS, -1], color=plotting.PALETTE[0])
    bars.bar_label(drawn, fmt="%.3f", fontsize=7, padding=2)
    bars.margins(y=0.15)
    bars.set_title(f"{label}: null bank, layer {layer}")
    bars.set_ylabel("mean router weight (0 to 1)")
    bars.spines[["top", "right"]].set_visible(False)
    return figure


def draw_layers(null_LS: Weights, mean_LJ: Weights, label: str) -> Figure:
    """Draw the null bank's weight by layer and decile, and every bank's mean weight by layer."""
    layers, banks = mean_LJ.shape
    figure, axes = plotting.panels(2, height=max(4.2, 1.4 + 0.2 * layers), width=6)
    by_decile, by_bank = axes[0]
    _heat(by_decile, null_LS[:, :NUM_BINS], "mean router weight")
    _decile_columns(by_decile)
    by_decile.set_title(f"{label}: null bank")
    _heat(by_bank, mean_LJ, "mean router weight")
    names = [*map(str, range(1, banks)), "null"]
    shown = [*range(0, banks - 1, math.ceil(banks / _MOST_TICKS)), banks - 1]
    by_bank.set_xticks(shown, [names[i] for i in shown])
    by_bank.set_xlabel("memory block")
    by_bank.set_title(f"{label}: all tokens")
    for axis in (by_decile, by_bank):
        axis.set_yticks(range(0, layers, math.ceil(layers / (2 * _MOST_TICKS))))
        axis.set_ylabel("layer")
    return figure


def _decile_columns(axis: Axes) -> None:
    names = ["0\nrarest", *map(str, range(1, NUM_BINS - 1)), f"{NUM_BINS - 1}\ncommonest"]
    axis.set_xticks(range(NUM_BINS), names)
    axis.set_xlabel("frequency decile of the input token")


def _heat(axis: Axes, values: Weights, unit: str) -> None:
    """Draw a heat map, with numbers if there is room."""
    image = axis.imshow(values, aspect="auto", cmap=plotting.HEAT, interpolation="nearest")
    axis.figure.colorbar(image, ax=axis, pad=0.02).set_label(unit, fontsize=8)
    if max(values.shape) > _MOST_NUMBERS:
        return
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            colour = "white" if value <= middle else "black"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)


@dataclass(frozen=True)
class Routing:
    """Mean router weights of a model."""

    weight_LSJ: NDArray[np.float64]
    """By the input token's slot; NaN in slots without a token."""
    mean_LJ: NDArray[np.float64]
    """Over all tokens."""
    count_S: NDArray[np.int64]
    """Input tokens in each slot."""

    @property
    def effective_L(self) -> NDArray[np.float64]:
        """Effective number of blocks, 1 to K: exp(entropy) of their shares of the weight not on the null bank.

        NaN if the null bank has all the weight.
        """
        blocks_LK = self.mean_LJ[:, :-1]
        with np.errstate(divide="ignore", invalid="ignore"):
            share_LK = blocks_LK / blocks_LK.sum(1, keepdims=True)
            terms_LK = np.where(share_LK == 0, 0.0, share_LK * np.log(share_LK))
        return np.exp(-terms_LK.sum(1))


class RoutingSums:
    """Accumulates router weights batch by batch."""

    def __init__(self, bin_of_type: Tensor) -> None:
        """Take the decile lookup [V] (see `SlotIndex`)."""
        self._index = SlotIndex(bin_of_type)
        self._sum_LSJ: Tensor | None = None
        self._count_S = torch.zeros(len(SLOTS), dtype=torch.int64, device=bin_of_type.device)

    def update(self, alpha_LBTJ: Tensor, tokens_BT: Tensor, labels_BT: Tensor) -> None:
        """Add the weights of input tokens; positions with a negative label are padding and left out."""
        tokens_N = torch.where(labels_BT >= 0, tokens_BT, -1).flatten()
        hot_NS = self._index.one_hot(tokens_N)
        sum_LSJ = torch.einsum("ns,lnj->lsj", hot_NS.double(), alpha_LBTJ.flatten(1, 2).double())
        self._sum_LSJ = sum_LSJ if self._sum_LSJ is None else self._sum_LSJ + sum_LSJ
        self._count_S += hot_NS.sum(0)

    def result(self) -> Routing:
        """Return means over the tokens so far.

        Raises:
            ValueError: there are none.
        """
        if self._sum_LSJ is None or not self._count_S.any():
            raise ValueError("no token was routed: the held-out split has none")
        mean_LJ = self._sum_LSJ.sum(1) / self._count_S.sum()
        weight_LSJ = self._sum_LSJ / self._count_S[None, :, None]
        return Routing(weight_LSJ.cpu().numpy(), mean_LJ.cpu().numpy(), self._count_S.cpu().numpy())


def measure_routing(analysis: Analysis, run: TrainedRun) -> Routing:
    """Measure the router weights on the held-out sequences."""
    model = analysis.model(run)
    sums = RoutingSums(torch.from_numpy(run.bins).to(analysis.device.torch_device))
    for batch in analysis.held_out(run):
        alpha_LBTJ = model.score([batch], routers="all")[0].alpha_LBTJ
        assert alpha_LBTJ is not None
        tokens_BT, labels_BT = (x.to(alpha_LBTJ.device) for x in batch)
        sums.update(alpha_LBTJ, tokens_BT, labels_BT)
    return sums.result()


def run(analysis: Analysis) -> Section:
    """Average the router weights of every run with memory over held-out text.

    Raises:
        SkippedError: no run has memory.
    """
    results = {run.label: measure_routing(analysis, run) for run in analysis.with_memory}
    null_weights = {label: routing.weight_LSJ[..., -1] for label, routing in results.items()}
    figures = {"null_by_decile": draw_null(null_weights, analysis.looks)}
    for number, (label, routing) in enumerate(results.items(), start=1):
        figures[f"last_layer_{number}"] = draw_one_layer(
            routing.weight_LSJ[-1], label, len(routing.mean_LJ) - 1
        )
        figures[f"layers_{number}"] = draw_layers(routing.weight_LSJ[..., -1], routing.mean_LJ, label)
    return Section(
        paper=(
            "In the last layer of TIDE-8E-1B the null bank's mean weight never falls with frequency: from 0.530 "
            "on the rarest decile to 0.889 on the commonest. Block 5 has about 0.31 on rare tokens and almost "
            "none on common ones; block 4 serves the middle deciles."
        ),
        findings=tuple(
            sentence for label, routing in results.items() for sentence in _findings(label, routing)
        ),
        tables={"by_slot": _by_slot(results), "by_layer": _by_layer(results)},
        figures=figures,
        notes=(
            f"{_routed(results)} held-out input tokens. Tokens of no decile are not in the figures by decile: "
            "dropped and unseen have rows of their own in the table by_slot. Means over all tokens include them.",
            "Blocks are numbered from 1, layers from 0.",
        ),
    )


def _routed(results: dict[str, Routing]) -> str:
    each = {label: f"{int(of.count_S.sum()):,}" for label, of in results.items()}
    if len(set(each.values())) == 1:
        return next(iter(each.values()))
    return ", ".join(f"{label} {number}" for label, number in each.items())


def _findings(label: str, routing: Routing) -> list[str]:
    null_LB = routing.weight_LSJ[:, :NUM_BINS, -1]
    last = len(null_LB) - 1
    filled = np.flatnonzero(routing.count_S[:NUM_BINS]).tolist()
    by_layer = routing.mean_LJ[:, -1]
    overall = (
        f"{label}: over all tokens the null bank has {by_layer.mean():.3f} (mean over layers), least in layer "
        f"{by_layer.argmin()} ({by_layer.min():.3f}), most in layer {by_layer.argmax()} ({by_layer.max():.3f})"
    )
    found = []
    if len(filled) > 1:
        known = null_LB[last, filled].tolist()
        steps = [after - before for before, after in pairwise(known)]
        rises = sum(step > 0 for step in steps)
        order = "never falls" if min(steps) >= 0 else f"rises in {rises} of {len(steps)} steps"
        rarest, commonest = _decile(filled[0]), _decile(filled[-1])
        found.append(
            f"{label}: in the last layer the null bank's mean weight goes from {known[0]:.3f} on {rarest} to "
            f"{known[-1]:.3f} on {commonest} and {order} with frequency."
        )
        rising = int((null_LB[:, filled[-1]] > null_LB[:, filled[0]]).sum())
        overall += f", and more on {commonest} than on {rarest} in {rising} of {len(null_LB)} layers"
    found.append(f"{overall}.")
    blocks_K, effective = routing.mean_LJ[last, :-1], routing.effective_L
    if not np.isnan(effective).all():
        found.append(
            f"{label}: block {blocks_K.argmax() + 1} has the most of the {len(blocks_K)} in the last layer "
            f"({blocks_K.max():.3f}); by the entropy of their shares {effective[last]:.1f} blocks are in "
            f"effective use there, {np.nanmin(effective):.1f} to {np.nanmax(effective):.1f} over the layers."
        )
    return found


def _decile(index: int) -> str:
    return {0: "the rarest decile", NUM_BINS - 1: "the commonest decile"}.get(index, f"decile {index}")


def _banks(count: int) -> list[str]:
    return [*(f"block {k}" for k in range(1, count)), "null"]


def _by_slot(results: dict[str, Routing]) -> DataTable:
    rows: list[tuple[Cell, ...]] = []
    for label, of in results.items():
        for layer, weight_SJ in enumerate(of.weight_LSJ):
            for slot, weight_J, count in zip(SLOTS, weight_SJ.tolist(), of.count_S.tolist(), strict=True):
                banks = zip(_banks(len(weight_J)), weight_J, strict=True)
                rows += [(label, layer, slot, count, bank, w if count else None) for bank, w in banks]
    return DataTable.of(("run", "layer", "decile of input token", "tokens", "bank", "mean weight"), rows)


def _by_layer(results: dict[str, Routing]) -> DataTable:
    rows: list[tuple[Cell, ...]] = []
    for label, of in results.items():
        for layer, (mean_J, effective) in enumerate(
            zip(of.mean_LJ.tolist(), of.effective_L.tolist(), strict=True)
        ):
            even = None if np.isnan(effective) else effective
            rows += [
                (label, layer, bank, weight, even)
                for bank, weight in zip(_banks(len(mean_J)), mean_J, strict=True)
            ]
    return DataTable.of(("run", "layer", "bank", "mean weight", "effective blocks of the layer"), rows)
