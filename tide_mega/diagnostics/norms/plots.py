"""Figures of embedding norms: means per decile, distributions, growth between checkpoints."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure

from tide_mega.data.frequency import NUM_BINS
from tide_mega.diagnostics.norms.measure import RunNorms
from tide_mega.plotting.lines import lines
from tide_mega.plotting.panel_grid import panel_grid
from tide_mega.plotting.style import HEAT, MARKERS, PALETTE, decile_axis, label, panels

MOST_INTERVALS = 8
"""Between checkpoints, that a panel shows."""


def draw_means(runs: Sequence[RunNorms]) -> Figure:
    """Mean norm per decile of the input embedding, and of the memory's tables where a run has them."""
    with_memory = [run for run in runs if run.tables_FK is not None]
    figure, axes = panels(2 if with_memory else 1)
    x = np.arange(NUM_BINS)
    for run, look in zip(runs, lines([run.num_blocks for run in runs]), strict=True):
        form = f"{look.marker}{look.dash}"
        axes[0, 0].plot(x, run.means_F, form, color=look.colour, label=run.label)
        if run.tables_FK is not None:
            low, high, mean = (of(run.tables_FK, axis=1) for of in (np.min, np.max, np.mean))
            name = f"{run.label}, mean and range of {run.tables_FK.shape[1]} blocks"
            axes[0, 1].plot(x, mean, form, color=look.colour, label=name)
            axes[0, 1].fill_between(x, low, high, color=look.colour, alpha=0.25, linewidth=0)
    titles = ("Input embedding E", "Memory tables Eₖ")
    for axis, title in zip(axes[0], titles, strict=False):
        axis.margins(y=0.15)
        label(axis, title, "", "mean l2 norm of rows")
        decile_axis(axis)
        axis.legend(frameon=False, fontsize=8)
    return figure


def draw_distributions(runs: Sequence[RunNorms]) -> Figure:
    """Density of the input embedding's norms, rare types against common ones; a panel for each run."""
    figure, flat = panel_grid(len(runs))
    for axis, run in zip(flat, runs, strict=True):
        for role, colour, line in (("rare", PALETTE[1], "-"), ("common", PALETTE[0], "--")):
            density = run.density[role]
            axis.stairs(density, run.edges, fill=True, color=colour, alpha=0.3)
            axis.stairs(
                density, run.edges, color=colour, linestyle=line, linewidth=1.6, label=f"{role} types"
            )
        axis.margins(y=0.1)
        label(axis, f"Norms of E, {run.label}", "l2 norm of a row", "density (1 / norm)")
        axis.legend(frameon=False)
    return figure


def draw_growth(runs: Sequence[RunNorms]) -> Figure:
    """Change of the mean norm between checkpoints per decile, early intervals dark; a panel for each run."""
    figure, flat = panel_grid(len(runs))
    heat = ListedColormap(matplotlib.colormaps[HEAT](np.linspace(0, 0.9, 256)))
    for axis, run in zip(flat, runs, strict=True):
        growth = run.growth.thinned(MOST_INTERVALS)
        ends = np.array(growth.tokens_C[1:]) / growth.unit
        scale = Normalize(growth.tokens_C[0] / growth.unit, ends[-1])
        for i, (rate_F, end) in enumerate(zip(growth.rate_CF, ends, strict=True)):
            marker = MARKERS[i % len(MARKERS)]
            axis.plot(np.arange(NUM_BINS), rate_F, f"{marker}-", color=heat(scale(end)), markersize=4)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.margins(y=0.12)
        label(
            axis,
            f"Growth of E's norms, {run.label}",
            "",
            f"change of mean l2 norm per {growth.unit_name} tokens",
        )
        decile_axis(axis)
        bar = figure.colorbar(ScalarMappable(scale, heat), ax=axis)
        bar.set_label(f"end of the interval ({growth.unit_name} training tokens)")
    return figure
