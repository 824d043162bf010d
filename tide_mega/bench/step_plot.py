"""The step benchmark as a figure: overhead over K = 0 by operation, measured or predicted."""

from pathlib import Path
from typing import Any

from tide_mega.bench.plots import floor_marks, new_figure, stacked


def plot_measured(found: dict[str, Any], path: Path) -> None:
    """Write the PNG of a measurement: step times with their quartiles, and where each K's overhead goes."""
    lines, options = found["lines"], found["options"]
    with_ops = [line for line in lines if "breakdown" in line]
    figure = new_figure(2 if with_ops else 1, width=6.5)
    axes = figure.subplots(1, 2 if with_ops else 1, squeeze=False)[0]
    labels = [f"K={line['blocks']}" for line in lines]
    totals = [line["seconds"]["total"] for line in lines]
    parts = {
        region: [1e3 * line["seconds"][region]["median"] for line in lines]
        for region in ("gradients", "optimizer")
    }
    stacked(axes[0], labels, parts)
    errors = [
        [1e3 * (t["median"] - t["low"]) for t in totals],
        [1e3 * (t["high"] - t["median"]) for t in totals],
    ]
    medians = [1e3 * t["median"] for t in totals]
    axes[0].errorbar(range(len(lines)), medians, errors, fmt="none", color="black", capsize=4)
    for number, line in enumerate(lines):
        if line["blocks"]:
            axes[0].annotate(
                f"{line['overhead']:+.1%}",
                (number, 1e3 * line["seconds"]["total"]["high"]),
                (0, 6),
                textcoords="offset points",
                ha="center",
            )
    axes[0].margins(y=0.12)
    axes[0].set_ylabel("ms a step (median, quartiles)")
    axes[0].set_title("Training step, and overhead over K = 0")
    axes[0].legend(loc="upper left", frameon=False)
    if with_ops:
        _overhead(axes[1], with_ops)
    figure.suptitle(
        f"{options['model']}, {options['accumulation']} × "
        f"{options['micro_batch'] * options['seq_length']:,} tokens, {options['precision']}, {options['device']}"
    )
    figure.savefig(path, format="png")


def _overhead(axis: Any, lines: list[dict[str, Any]]) -> None:
    def percent(line: dict[str, Any], seconds: float | None) -> float:
        base = line["seconds"]["total"]["median"] - line["added"]["total"]
        return 100 * (seconds or 0.0) / base

    parts = {
        term: [percent(line, line["breakdown"][term]["seconds"]) for line in lines]
        for term in lines[0]["breakdown"]
    }
    stacked(axis, [f"K={line['blocks']}" for line in lines], parts)
    floor_marks(axis, [100 * line["floor_overhead"] for line in lines])
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_ylabel("% of the step at K = 0")
    axis.set_title("Where the overhead goes")
    axis.legend(frameon=False, fontsize=8)


def plot_predicted(found: dict[str, Any], path: Path) -> None:
    """Write the PNG of a prediction: a panel for each number of microbatches."""
    lines, options = found["lines"], found["options"]
    accumulations = list(dict.fromkeys(line["accumulation"] for line in lines))
    figure = new_figure(len(accumulations))
    for axis, accumulation in zip(
        figure.subplots(1, len(accumulations), squeeze=False)[0], accumulations, strict=True
    ):
        chosen = [line for line in lines if line["accumulation"] == accumulation]
        parts = {
            term: [100 * line["seconds"][term] / line["base_seconds"] for line in chosen]
            for term in chosen[0]["seconds"]
        }
        stacked(axis, [f"K={line['blocks']}" for line in chosen], parts)
        axis.set_ylabel("% of the step at K = 0")
        axis.set_title(f"{accumulation} × {chosen[0]['tokens']:,} tokens a step")
        axis.legend(frameon=False, fontsize=8)
    figure.suptitle(
        f"Predicted from byte counts: {options['model']} on one {options['gpu'].upper()}, K = 0 at "
        f"{options['mfu']:.0%} MFU, memory at {options['bandwidth_share']:.0%} of the bandwidth, "
        f"tables' AdamW over {options['replicas']} rank{'s' if options['replicas'] > 1 else ''}"
    )
    figure.savefig(path, format="png")
