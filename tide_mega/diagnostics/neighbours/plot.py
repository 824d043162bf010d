"""How far neighbours agree, as boxes.

Shapes: K blocks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from tide_mega.plotting.style import PALETTE, label, panels

WIDTH = 0.32


def draw_overlaps(name: str, neighbours: int, overlaps: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """Distribution of the overlap with E for every block, roles side by side.

    Args:
        name: of the run.
        neighbours: in a list.
        overlaps: by role, the Jaccard overlaps of the queries in each block [K].
    """
    shown = [role for role, blocks in overlaps.items() if any(len(values) for values in blocks)]
    K = max(len(blocks) for blocks in overlaps.values())
    figure, axes = panels(1, width=max(6.4, 0.5 * K + 2.4), height=4.6)
    axis = axes[0, 0]
    patches = []
    for i, role in enumerate(shown):
        look: dict[str, Any] = {
            "facecolor": PALETTE[1 - i % 2],
            "alpha": 0.55,
            "hatch": "//" if i % 2 else None,
        }
        axis.boxplot(
            list(overlaps[role]),
            positions=np.arange(1, K + 1) + (i - (len(shown) - 1) / 2) * 1.2 * WIDTH,
            widths=WIDTH,
            patch_artist=True,
            showmeans=True,
            manage_ticks=False,
            boxprops=look,
            medianprops={"color": "black", "linewidth": 1.6},
            meanprops={
                "marker": "D",
                "markerfacecolor": "white",
                "markeredgecolor": "black",
                "markersize": 4,
            },
            flierprops={"marker": ".", "markersize": 4, "markeredgecolor": look["facecolor"]},
        )
        patches.append(Patch(**look, edgecolor="black", label=f"{role} types"))
    top = max((value for role in shown for values in overlaps[role] for value in values), default=0.0)
    axis.set_ylim(-0.03 * max(top, 0.1), 1.2 * max(top, 0.1))  # boxes at 0 and the legend are seen
    axis.set_xlim(0.4, K + 0.6)
    axis.set_xticks(range(1, K + 1))
    title = f"{name}: the {neighbours} nearest under Eₖ and under E"
    label(axis, title, "memory block k (diamond: mean)", "Jaccard overlap (0 to 1)")
    axis.legend(handles=patches, frameon=False, ncols=len(patches) or 1, loc="upper right")
    return figure
