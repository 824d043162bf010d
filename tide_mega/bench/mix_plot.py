"""The mix benchmark as a figure: time of a layer by part beside the floor, and peak memory."""

from pathlib import Path
from typing import Any

from tide_mega.bench.plots import floor_marks, new_figure, stacked


def plot_mix(found: dict[str, Any], path: Path) -> None:
    """Write the PNG of a result of tools/bench_mix.py."""
    lines, options = found["lines"], found["options"]
    has_peaks = all("peak" in line for line in lines)
    columns = 2 if has_peaks else 1
    figure = new_figure(columns, width=max(5.0, 0.9 * len(lines) + 2.0))
    axes = figure.subplots(1, columns, squeeze=False)[0]
    labels = [f"{line['version']}\nK={line['blocks']}\nL={line['layers']}" for line in lines]
    parts = {
        region: [1e3 * _median(line, region) / line["layers"] for line in lines]
        for region in ("order", "forward", "backward", "row gradient")
    }
    stacked(axes[0], labels, parts)
    floor_marks(axes[0], [1e3 * sum(line["floor_seconds"].values()) / line["layers"] for line in lines])
    axes[0].set_ylabel("ms a layer (median)")
    axes[0].set_title("Time; autograd's row gradient is in its backward")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, ncols=5, loc="outside lower center")
    if has_peaks:
        stacked(axes[1], labels, {"peak": [line["peak"] / 1e6 for line in lines]})
        axes[1].set_ylabel("MB above the inputs")
        axes[1].set_title("Peak memory, all layers")
    figure.suptitle(
        f"N = {options['tokens']:,}, D = {options['width']:,}, {options['dtype']}, "
        f"{options['distribution']} ids, {options['device']}"
    )
    figure.savefig(path, format="png")


def _median(line: dict[str, Any], region: str) -> float:
    found = line["seconds"].get(region)
    return 0.0 if found is None else found["median"]
