"""Shows the step benchmark's results as text and as figures.

The figures break the overhead over K = 0 down by operation, measured or predicted.
"""

from pathlib import Path
from typing import Any

from tide_mega.lab.bench.show import floor_marks, megabytes, milliseconds, new_figure, stacked
from tide_mega.text_table import aligned


def show_measured(found: dict[str, Any]) -> str:
    """Return the steps at every K, then the breakdown of their overhead."""
    options, lines = found["options"], found["lines"]
    tokens = options["micro_batch"] * options["seq_length"]
    head = ["K", "step ms", "gradients ms", "optimizer ms", "tokens/s", "MFU", "peak MB", "over K=0", "floor"]
    rows = []
    for line in lines:
        seconds = line["seconds"]
        half = (seconds["total"]["high"] - seconds["total"]["low"]) / 2
        row = [str(line["blocks"]), f"{milliseconds(seconds['total']['median'])} ±{milliseconds(half)}"]
        row += [milliseconds(seconds[region]["median"]) for region in ("gradients", "optimizer")]
        row.append(f"{line['tokens_per_second']:,.0f}")
        row.append("-" if line["mfu"] is None else f"{line['mfu']:.1%}")
        row.append(megabytes(line["peak"]) if "peak" in line else "-")
        row += (
            [f"{line['overhead']:+.2%}", f"{line['floor_overhead']:+.2%}"] if line["blocks"] else ["-", "-"]
        )
        rows.append(row)
    threads = f" with {options['threads']} threads" if options["device"] == "cpu" else ""
    text = (
        f"Training steps of {options['model']} ({options['layers']} layers), {options['accumulation']} x "
        f"{tokens:,} tokens of sequences of {options['seq_length']:,}, {options['precision']}, on "
        f"{options['device']}{threads}; measured bandwidth {found['bandwidth'] / 1e9:,.1f} GB/s\n"
        f"{aligned([head], rows)}"
    )
    for blocks, reason in found["left_out"].items():
        text += f"\nK={blocks} is left out: {reason}"
    with_ops = [line for line in lines if "breakdown" in line]
    return f"{text}\n\n{_breakdown_table(with_ops, lines)}" if with_ops else text


def _breakdown_table(with_ops: list[dict[str, Any]], lines: list[dict[str, Any]]) -> str:
    rows = []
    for line in with_ops:
        step = line["seconds"]["total"]["median"] - line["added"]["total"]  # of K = 0
        for term, part in line["breakdown"].items():
            seconds, floor, share = part["seconds"], part["floor"], part["of_floor"]
            row = [str(line["blocks"]), term]
            row += ["-", "-"] if seconds is None else [milliseconds(seconds), f"{seconds / step:+.2%}"]
            row.append("-" if floor is None else milliseconds(floor))
            row.append("-" if share is None else f"{share:.0%}")
            rows.append(row)
        rows.append(
            [
                *(
                    str(line["blocks"]),
                    "all",
                    milliseconds(line["added"]["total"]),
                    f"{line['overhead']:+.2%}",
                ),
                milliseconds(sum(line["floor_seconds"].values())),
                "-",
            ]
        )
    head = ["K", "operation", "ms a step", "of the step at K=0", "floor ms", "of floor"]
    return f"Where it goes, each operation timed by itself\n{aligned([head], rows)}"


def show_predicted(found: dict[str, Any]) -> str:
    """Return the overhead at every accumulation and K, and the share of each term."""
    options, lines = found["options"], found["lines"]
    terms = list(lines[0]["seconds"])
    head = ["microbatches", "K", "types", "step ms", "over K=0", *terms, "largest"]
    rows = []
    for line in lines:
        row = [str(line["accumulation"]), str(line["blocks"]), f"{line['micro_types']:,}"]
        row += [f"{1e3 * line['base_seconds']:,.1f}", f"{line['overhead']:+.2%}"]
        row += [f"{line['seconds'][term] / line['base_seconds']:.2%}" for term in terms]
        rows.append([*row, line["dominating"]])
    ranks = f"{options['replicas']} data-parallel rank{'s' if options['replicas'] > 1 else ''}"
    return (
        f"Predicted from byte counts: {options['model']} on one {options['gpu'].upper()}, microbatches of "
        f"{lines[0]['tokens']:,} tokens, bf16; K = 0 at {options['mfu']:.0%} MFU of {options['tflops']:,.0f} "
        f"TFLOP/s, the memory at {options['bandwidth_share']:.0%} of {found['bandwidth'] / 1e12:g} TB/s, tables' "
        f"AdamW over {ranks}; terms in % of the step at K = 0\n{aligned([head], rows)}"
    )


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
    """Write the PNG of a prediction: one panel per number of microbatches."""
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
