"""Bytes in memory and on disk against the number of memory blocks."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tide_mega.diagnostics.storage.sizes import CACHE, Sizes
from tide_mega.hf.rows_tide import KINDS
from tide_mega.plotting import style
from tide_mega.plotting.lines import line

SHOWN = "int4"
"""The format whose cache is drawn: the paper's 4 bit."""


def draw(name: str, sizes: Sequence[Sizes], paper: tuple[float, float] | None = None) -> Figure:
    """Left what a device needs with the rows on disk and with all rows in memory; right the files by format.

    `paper` are its bytes of the base model at 8 bit, and on disk at K = 24 and 4 bit.
    """
    figure, (axes,) = style.panels(2, width=6, height=4.4)
    scale, unit = (1e9, "GB") if max(of.file for of in sizes) >= 1e9 else (1e6, "MB")
    _memory(axes[0], sizes, scale)
    _disk(axes[1], sizes, scale)
    style.label(axes[0], f"{name}: in memory", "memory blocks K", f"memory ({unit})")
    style.label(axes[1], f"{name}: on disk", "memory blocks K", f"file of rows ({unit})")
    if paper is not None:
        base, disk = paper
        axes[0].axhline(
            base / scale, color="black", linestyle=":", linewidth=1.2, label="paper, weights at 8 bit"
        )
        axes[1].plot([24], [disk / scale], "x", color="black", markersize=9, label="paper, 4 bit")
    for axis in axes:
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False, fontsize=9, loc="upper left")
    return figure


def _memory(axis: Axes, sizes: Sequence[Sizes], scale: float) -> None:
    shown = [of for of in sizes if of.kind in (None, SHOWN)]
    names = [str(of.num_blocks) for of in shown]
    places = range(len(shown))
    weights = [of.weights / scale for of in shown]
    axis.bar(places, weights, color="#bdbdbd", width=0.6, label="weights at 8 bit")
    axis.bar(
        places,
        [of.cache / scale for of in shown],
        bottom=weights,
        color=line(1).colour,
        width=0.6,
        label=f"cache of {CACHE:.0%} of the rows, {SHOWN}",
    )
    look = line(0)
    inside = [(of.weights + of.rows) / scale for of in shown]
    axis.plot(
        places, inside, look.dash, marker=look.marker, color=look.colour, label=f"with all rows, {SHOWN}"
    )
    axis.set_xticks(list(places), names)
    axis.set_ylim(top=1.35 * max(inside))


def _disk(axis: Axes, sizes: Sequence[Sizes], scale: float) -> None:
    blocks = sorted({of.num_blocks for of in sizes})
    for i, kind in enumerate(KINDS):
        look = line(i)
        files = [next((of.file for of in sizes if (of.num_blocks, of.kind) == (k, kind)), 0) for k in blocks]
        name = f"{kind}, half of the columns" if kind == "rank" else kind
        axis.plot(
            blocks, [n / scale for n in files], look.dash, marker=look.marker, color=look.colour, label=name
        )
    axis.set_xticks(blocks)
