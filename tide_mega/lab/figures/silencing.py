"""Perplexity with the memory of one layer left out, for every layer (paper, Figure 11, appendix H).

The figure has one line per text.

Shapes: L layers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from tide_mega.data.loader import TokenBatch
from tide_mega.lab import plotting
from tide_mega.lab.figures.analysis import Analysis
from tide_mega.lab.figures.kit import missing_texts, rise, scored_note
from tide_mega.lab.figures.section import Cell, DataTable, Section
from tide_mega.lab.plotting import line
from tide_mega.trained.model import TrainedModel
from tide_mega.trained.run import TrainedRun

_MOST_TICKS = 14
_WIDE = 20.0
"""Ratio of the largest to the median value from which an axis is logarithmic."""


class Silenced(Protocol):
    """The part of `Silencing` that is drawn."""

    @property
    def loss(self) -> float:
        """Nats per token, with all memory."""

    @property
    def perplexity_L(self) -> NDArray[np.float64]:
        """Without the memory of one layer."""

    @property
    def rise_L(self) -> NDArray[np.float64]:
        """In per cent."""


def draw_silencing(label: str, by_text: Mapping[str, Silenced]) -> Figure:
    """Draw the perplexity, the whole model's dashed (left), and its rise in per cent (right)."""
    figure, axes = plotting.panels(2, width=6)
    absolute, relative = axes[0]
    for i, (name, of) in enumerate(by_text.items()):
        look = line(i)
        layers = range(len(of.rise_L))
        drawn = {"marker": look.marker, "color": look.colour, "label": name}
        absolute.axhline(math.exp(of.loss), color=look.colour, linestyle="--", linewidth=1)
        absolute.plot(layers, of.perplexity_L, look.dash, **drawn)
        relative.plot(layers, of.rise_L, look.dash, **drawn)
    relative.axhline(0, color=plotting.GREY, linestyle="--", linewidth=1)
    plotting.label(
        absolute, f"{label}: perplexity (dashed: nothing silenced)", "silenced layer", "perplexity"
    )
    plotting.label(relative, f"{label}: rise of perplexity", "silenced layer", "rise (%)")
    for axis in axes[0]:
        _layers(axis, max(len(of.rise_L) for of in by_text.values()))
    _widen(absolute, np.concatenate([of.perplexity_L for of in by_text.values()]), around_zero=False)
    _widen(relative, np.concatenate([of.rise_L for of in by_text.values()]), around_zero=True)
    handles, labels = relative.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False)
    return figure


def _layers(axis: Axes, number: int) -> None:
    axis.set_xticks(range(0, number, math.ceil(number / _MOST_TICKS)))


def _widen(axis: Axes, values: NDArray[np.float64], *, around_zero: bool) -> None:
    """Make the axis logarithmic if one value towers above the others; around 0 it is linear up to 1."""
    size = np.abs(values[np.isfinite(values)])
    if not size.size or size.max() <= max(_WIDE * float(np.median(size)), _WIDE):
        return
    if around_zero:
        axis.set_yscale("symlog", linthresh=1.0)
        finite = values[np.isfinite(values)]
        axis.set_ylim(min(-1.0, 2 * finite.min()), max(1.0, 3 * finite.max()))
    else:
        axis.set_yscale("log")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


Tokens = dict[tuple[str, str], int]
"""Tokens scored, by run and text."""


@dataclass(frozen=True)
class Silencing:
    """Mean losses of one model on one text, nats per token."""

    loss: float
    """With its memory."""
    silenced_L: NDArray[np.float64]
    """Without that of one layer."""
    all_silenced: float
    """Without any."""

    @property
    def perplexity_L(self) -> NDArray[np.float64]:
        """Without the memory of one layer."""
        with np.errstate(over="ignore"):
            return np.exp(self.silenced_L)

    @property
    def rise_L(self) -> NDArray[np.float64]:
        """Rise of the perplexity, in per cent; negative where it falls."""
        return np.array([rise(self.loss, silenced) for silenced in self.silenced_L])


def measure_silencing(mean_loss: Callable[[Sequence[int]], float], num_layers: int) -> Silencing:
    """Measure the mean loss with no layer, each layer, and all layers silenced."""
    return Silencing(
        mean_loss(()),
        np.array([mean_loss((layer,)) for layer in range(num_layers)]),
        mean_loss(range(num_layers)),
    )


def mean_loss(model: TrainedModel, batches: Sequence[TokenBatch], silenced: Sequence[int]) -> float:
    """Score batches with layers silenced; return nats per labelled token.

    Raises:
        ValueError: no token has a label.
    """
    total, tokens = 0.0, 0
    with model.silenced(*silenced):
        for batch in batches:
            cross_entropy_BT = model.score([batch])[0].cross_entropy_BT
            assert cross_entropy_BT is not None
            total += cross_entropy_BT.double().sum().item()
            tokens += int((batch.labels_BT >= 0).sum())
    if not tokens:
        raise ValueError("no token has a label: the text is too short to score")
    return total / tokens


def run(analysis: Analysis) -> Section:
    """Silence every layer in turn, on the held-out split and on each text file.

    Raises:
        SkippedError: no run has memory.
    """
    results: dict[str, dict[str, Silencing]] = {}
    tokens: Tokens = {}
    for opened in analysis.with_memory:
        texts = analysis.texts(opened)
        for name, batches in texts.items():
            tokens[opened.label, name] = sum(int((batch.labels_BT >= 0).sum()) for batch in batches)
        results[opened.label] = _silence(analysis, opened, texts)
    return Section(
        paper=(
            "Without the memory of layer 0 the perplexity of TIDE-24E-1B rises by more than 1,000 % on every "
            "text, and by 1.09e6 % on PubMed; without that of layer 1 by 8.1 to 12.9 %, of layers 4 to 12 by "
            "less than 2 % each. A second peak is at layer 13."
        ),
        findings=tuple(
            sentence for label, by_text in results.items() for sentence in _findings(label, by_text)
        ),
        tables={"by_layer": _by_layer(results), "whole_model": _whole_model(results, tokens)},
        figures={
            f"layers_{number}": draw_silencing(label, by_text)
            for number, (label, by_text) in enumerate(results.items(), start=1)
        },
        notes=(
            f"{scored_note(tokens)} Layers count from 0; a silenced one keeps its attention and feed-forward.",
            *missing_texts(analysis),
        ),
    )


def _silence(
    analysis: Analysis, opened: TrainedRun, texts: Mapping[str, Sequence[TokenBatch]]
) -> dict[str, Silencing]:
    # A separate function, so that nothing keeps this model alive while the next run's is built.
    model = analysis.model(opened)
    return {
        name: measure_silencing(partial(mean_loss, model, batches), model.num_layers)
        for name, batches in texts.items()
    }


def _findings(label: str, by_text: Mapping[str, Silencing]) -> list[str]:
    found = []
    for name, of in by_text.items():
        order = np.argsort(-of.rise_L)
        text = (
            f"{label}, {name}: perplexity {_number(math.exp(of.loss))} rises most without the memory of layer "
            f"{order[0]} ({of.rise_L[order[0]]:+,.1f} %)"
        )
        if len(order) > 1:
            text += f", least without that of layer {order[-1]} ({of.rise_L[order[-1]]:+,.1f} %)"
        found.append(f"{text}; without any by {rise(of.loss, of.all_silenced):+,.1f} %.")
    if len(by_text) > 1:
        worst = max(by_text, key=lambda name: float(by_text[name].rise_L.max()))
        found.append(f"{label}: the text that suffers most from one silenced layer is {worst}.")
    return found


def _number(value: float) -> str:
    return f"{value:,.2f}" if value < 1e6 else f"{value:.3g}"


def _by_layer(results: Mapping[str, Mapping[str, Silencing]]) -> DataTable:
    rows: list[tuple[Cell, ...]] = [
        (label, name, layer, *values)
        for label, by_text in results.items()
        for name, of in by_text.items()
        for layer, values in enumerate(
            zip(of.silenced_L.tolist(), of.perplexity_L.tolist(), of.rise_L.tolist(), strict=True)
        )
    ]
    return DataTable.of(
        ("run", "text", "silenced layer", "loss (nats per token)", "perplexity", "rise of perplexity (%)"),
        rows,
    )


def _whole_model(results: Mapping[str, Mapping[str, Silencing]], tokens: Tokens) -> DataTable:
    rows: list[tuple[Cell, ...]] = [
        (
            label,
            name,
            tokens[label, name],
            math.exp(of.loss),
            float(np.exp(of.all_silenced)),
            rise(of.loss, of.all_silenced),
        )
        for label, by_text in results.items()
        for name, of in by_text.items()
    ]
    return DataTable.of(
        (
            "run",
            "text",
            "tokens scored",
            "perplexity",
            "perplexity with all layers silenced",
            "rise of perplexity (%)",
        ),
        rows,
    )
