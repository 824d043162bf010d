"""Perplexity against the rank that is left, and against the bytes that it takes."""

import math
from collections.abc import Mapping
from typing import Protocol

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from tide_mega.diagnostics.rank.cuts import JOINT, PER_TABLE, Cut
from tide_mega.metrics.records import TextResult
from tide_mega.plotting import style
from tide_mega.plotting.lines import line

_DASHES = {PER_TABLE: "-", JOINT: "--"}
_NAMES = {PER_TABLE: "each table by itself", JOINT: "all tables jointly"}
_PAPER_MARKERS = "x+1"


class Curves(Protocol):
    """What is drawn of a run (`tide_mega.diagnostics.rank.report.RankCurves`)."""

    @property
    def label(self) -> str:
        """The run's."""

    @property
    def whole(self) -> Mapping[str, TextResult]:
        """Of the model as it is, by text."""

    @property
    def methods(self) -> list[str]:
        """`PER_TABLE`, `JOINT`."""

    def of(self, method: str) -> list[Cut]:
        """Of a method, the smallest p first."""

    def rise(self, cut: Cut, text: str) -> float:
        """Of the perplexity, per cent."""


def draw(curves: Curves, paper_at_90: Mapping[str, float]) -> Figure:
    """Perplexity against p; its rise, with the paper's at 90 %; its rise against the bytes of the factors."""
    figure, axes = style.panels(3, width=5.4, height=4.6)
    absolute, relative, by_bytes = axes[0]
    for i, (name, whole) in enumerate(curves.whole.items()):
        look = line(i)
        absolute.axhline(whole.perplexity, color=look.colour, linestyle=":", linewidth=1)
        for method in curves.methods:
            cuts = curves.of(method)
            drawn = {
                "color": look.colour,
                "linestyle": _DASHES[method],
                "marker": look.marker,
                "markersize": 4.5,
            }
            percents = [0, *(cut.percent for cut in cuts)]
            rises = [curves.rise(cut, name) for cut in cuts]
            absolute.plot(
                percents, [whole.perplexity, *(cut.by_text[name].perplexity for cut in cuts)], **drawn
            )
            relative.plot(percents, [0.0, *rises], **drawn)
            by_bytes.plot([100 * cut.stored / cut.dense for cut in cuts], rises, **drawn)
    for marker, (name, value) in zip(_PAPER_MARKERS, paper_at_90.items(), strict=True):
        relative.plot([90], [value], linestyle="", marker=marker, color=style.GREY, markersize=8, label=name)
    style.label(
        absolute,
        f"{curves.label}: perplexity (dotted: nothing cut)",
        "reduction of the rank p (%)",
        "perplexity",
    )
    style.label(relative, "Rise of perplexity", "reduction of the rank p (%)", "rise (%)")
    style.label(
        by_bytes, "Rise against bytes stored", "bytes of the factors, of the tables' in bf16 (%)", "rise (%)"
    )
    relative.legend(frameon=False, fontsize=9, loc="upper left", title="paper, TIDE-8E-1B", title_fontsize=9)
    by_bytes.axvline(100, color=style.GREY, linestyle=":", linewidth=1)
    by_bytes.annotate(
        "saves nothing",
        (100, 1),
        xycoords=("data", "axes fraction"),
        xytext=(-3, -4),
        ha="right",
        textcoords="offset points",
        va="top",
        fontsize=8,
        color=style.GREY,
    )
    absolute.set_yscale("log")
    absolute.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    absolute.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    _from_zero(relative)
    _from_zero(by_bytes)
    _legend(figure, curves)
    return figure


def _from_zero(axis: Axes) -> None:
    """Make the axis linear up to 1 % and logarithmic beyond."""
    axis.axhline(0, color="black", linewidth=0.8, zorder=0)
    axis.set_yscale("symlog", linthresh=1.0)
    low, high = axis.get_ylim()
    axis.set_ylim(max(low, -2.0) if math.isfinite(low) else -2.0, 2 * max(high, 1.0))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _legend(figure: Figure, curves: Curves) -> None:
    """Name texts by colour and methods by dash, under all panels."""
    handles = [
        Line2D([], [], color=line(i).colour, marker=line(i).marker, linestyle="", label=name)
        for i, name in enumerate(curves.whole)
    ]
    handles += [
        Line2D([], [], color="black", linestyle=_DASHES[method], label=_NAMES[method])
        for method in curves.methods
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False)
