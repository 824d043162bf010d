"""The step benchmark's results as text."""

from typing import Any

from tide_mega.bench.table import aligned, megabytes, milliseconds


def show_measured(found: dict[str, Any]) -> str:
    """Steps at every K, then the breakdown of what each adds."""
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
        f"{aligned(head, rows)}"
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
    return f"Where it goes, each operation timed by itself\n{aligned(head, rows)}"


def show_predicted(found: dict[str, Any]) -> str:
    """The overhead at every accumulation and K, and the share of each term."""
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
        f"AdamW over {ranks}; terms in % of the step at K = 0\n{aligned(head, rows)}"
    )
