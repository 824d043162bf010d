"""Milliseconds a token against the number of memory blocks, and their ratio to the baseline's."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from tide_mega.diagnostics.decoding.times import Times
from tide_mega.plotting import style
from tide_mega.plotting.lines import BASELINE, line


def draw(times: Sequence[Times], base: Times | None, paper: Mapping[int, float]) -> Figure:
    """Medians with the middle half of the steps; with a baseline their ratio to it, beside the paper's by K."""
    figure, (axes,) = style.panels(1 if base is None else 2, width=6, height=4.4)
    most = max(one.num_blocks for one in times)
    places = list(dict.fromkeys(one.place for one in times))
    with_memory = [place for place in places if place]
    for place in places:
        number = with_memory.index(place) if place else 0
        look = line(number) if place else BASELINE
        drawn = {
            "color": look.colour,
            "marker": look.marker,
            "linestyle": "",
            "label": place or "no memory",
        }
        of_place = sorted((one for one in times if one.place == place), key=lambda one: one.num_blocks)
        blocks = [one.num_blocks for one in of_place]
        beside = 0.015 * number  # of an axis, so that bars at one K stand side by side
        medians = [one.median for one in of_place]
        below = [one.median - one.percentile(25) for one in of_place]
        above = [one.percentile(75) - one.median for one in of_place]
        axes[0].errorbar(
            [k + beside * most for k in blocks], medians, yerr=(below, above), capsize=3, **drawn
        )
        if base is not None and place:
            ratios = [one.ratios(base) for one in of_place]
            low = [ratio.median - ratio.quarter for ratio in ratios]
            high = [ratio.three_quarters - ratio.median for ratio in ratios]
            axes[1].errorbar(
                [k + beside * max(paper) for k in blocks],
                [ratio.median for ratio in ratios],
                yerr=(low, high),
                capsize=3,
                **drawn,
            )
    style.label(axes[0], "Decoding, batch 1 (bars: middle half)", "memory blocks K", "time a token (ms)")
    axes[0].set_ylim(bottom=0)
    if base is not None:
        of_paper = [ms / paper[0] for ms in paper.values()]
        axes[1].plot(list(paper), of_paper, "--x", color="black", linewidth=1, label="paper, 1B on a B200")
        axes[1].axhline(1, color=style.GREY, linestyle=":", linewidth=1)
        style.label(
            axes[1], f"Relative to {base.label} (bars: middle half of turns)", "memory blocks K", "ratio"
        )
    for axis in axes:
        axis.set_xticks(
            sorted({one.num_blocks for one in times} | (set(paper) if axis is not axes[0] else set()))
        )
        axis.legend(frameon=False, fontsize=9, loc="best")
    return figure
