"""A plan as text, as JSON values, and as one picture."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tide_mega.config.device_memory import device_memory
from tide_mega.config.schema import TideConfig
from tide_mega.dryrun.ledger import PHASES
from tide_mega.lab.plotting import GREY, PALETTE, new_figure
from tide_mega.plan.estimate import STEP, Estimate, message_seconds, nodes_of
from tide_mega.plan.rank import RankStep
from tide_mega.plan.rates import Rates, describe
from tide_mega.text_table import aligned

ORDER = ("weights", "masters", "moments", "gradients", "activations", "logits", "rows", "exchange", "buckets")
"""Kinds of memory from the bottom of the picture; `update` and `other` follow."""
LAST = ("update", "other")


def as_text(
    config: TideConfig, world_size: int, ranks: Sequence[RankStep], found: Estimate, rates: Rates
) -> str:
    """Return the whole plan for a terminal."""
    return "\n\n".join(
        [
            _heading(config, world_size, ranks, found, rates),
            "Time of a step\n" + _times(found),
            "Memory at its fullest, GB\n"
            + _memory(ranks)
            + "\n"
            + _against_config(config, world_size, ranks),
            "The largest, at the fullest instant of the fullest rank\n" + _largest(ranks),
            "Sent and received by rank " + f"{ranks[0].rank} in a step\n" + _messages(ranks[0], rates),
            "Host waits of a step: " + _waits(ranks[0]),
            "Assumed\n" + aligned([["key", "value"]], [list(pair) for pair in describe(rates)], left=2),
        ]
    )


def _heading(
    config: TideConfig, world_size: int, ranks: Sequence[RankStep], found: Estimate, rates: Rates
) -> str:
    parallel = config.parallel
    replicas = world_size // (parallel.tensor * parallel.pipeline)
    lines = [
        f"{config.run.name}: {world_size} x {rates.gpu}; tensor {parallel.tensor}, pipeline {parallel.pipeline}, "
        f"data {replicas}, ZeRO-{parallel.zero_stage}; {ranks[0].microbatches} micro-batches of "
        f"{config.trainer.micro_batch_size} x {config.data.seq_length:,} tokens a step",
        f"{1e3 * found.seconds:,.0f} ms a step, {found.tokens_per_second:,.0f} tokens/s, "
        f"MFU {100 * found.mfu:.1f} %; "
        f"{max(r.peak.bytes for r in ranks) / 1e9:.2f} GB on the fullest GPU",
    ]
    if found.hours is not None and found.gpu_hours is not None and found.total_tokens is not None:
        lines.append(
            f"{found.total_tokens / 1e9:,.0f}B tokens: {found.hours / 24:,.1f} days, "
            f"{found.gpu_hours:,.0f} GPU hours"
        )
    lines.append(
        f"a checkpoint: {found.checkpoint_bytes / 1e9:,.1f} GB, written in {found.checkpoint_seconds:,.1f} s"
    )
    return "\n".join(lines)


def _times(found: Estimate) -> str:
    rows = [
        [
            name,
            *(
                f"{1e3 * value:,.1f}"
                for value in (t.products, t.traffic, t.launches, t.communication, t.waits, t.total)
            ),
        ]
        for name, t in found.phases.items()
    ]
    rows.append(["bubble", *[""] * 5, f"{1e3 * found.bubble:,.1f}"])
    rows.append(["step", *[""] * 5, f"{1e3 * found.seconds:,.1f}"])
    head = ["ms", "products", "other kernels", "launches", "communication", "waits", "all"]
    return aligned([head], rows, left=1, ruled=[len(rows) - 1])


def _memory(ranks: Sequence[RankStep]) -> str:
    kinds = [kind for kind in (*ORDER, *LAST) if any(kind in step.peak.by_kind for step in ranks)]
    rows = [
        [
            str(step.rank),
            str(step.stage),
            next(phase for phase, peak in step.peaks.items() if peak is step.peak),
            *(f"{step.peak.by_kind.get(kind, 0) / 1e9:.2f}" for kind in kinds),
            f"{step.peak.bytes / 1e9:.2f}",
        ]
        for step in ranks
    ]
    return aligned([["rank", "stage", "in", *kinds, "all"]], rows)


def _against_config(config: TideConfig, world_size: int, ranks: Sequence[RankStep]) -> str:
    counted = device_memory(config, world_size).total / 1e9
    fullest = max(step.peak.bytes for step in ranks) / 1e9
    return (
        f"The check of cluster.memory_gb counts {counted:.2f} GB, {100 * (counted / fullest - 1):+.0f} % of this; "
        "the CUDA context, NCCL's buffers and fragmentation take 3 to 6 GB more."
    )


def _largest(ranks: Sequence[RankStep]) -> str:
    fullest = max(ranks, key=lambda step: step.peak.bytes)
    rows = [[name, f"{size / 1e9:.3f}"] for name, size in list(fullest.peak.by_line.items())[:6]]
    return aligned([["kind: made by", "GB"]], rows, left=1)


def _messages(step: RankStep, rates: Rates) -> str:
    rows = []
    ordered = sorted(step.messages.items(), key=lambda item: -message_seconds(item[0], item[1], rates))
    for message, moved in ordered:
        if len(message.group) > 1:
            nodes = nodes_of(message.group)
            link = "in a node" if nodes == 1 else f"{nodes} nodes"
            rows.append(
                [
                    message.phase,
                    message.name.strip("_"),
                    str(len(message.group)),
                    link,
                    str(moved.count),
                    f"{moved.bytes / 1e6:,.2f}",
                    f"{1e3 * message_seconds(message, moved, rates):,.2f}",
                    message.place.rpartition("/")[2],
                ]
            )
    head = ["phase", "collective", "members", "link", "times", "MB", "ms", "in"]
    return aligned([head], rows, left=2) if rows else "nothing"


def _waits(step: RankStep) -> str:
    each = (f"{count} {wait.kind} ({wait.place.rpartition('/')[2]})" for wait, count in step.waits.items())
    return ", ".join(each) or "none"


def as_json(
    config: TideConfig, world_size: int, ranks: Sequence[RankStep], found: Estimate, rates: Rates
) -> dict[str, Any]:
    """Return the plan as JSON values; times in seconds, sizes in bytes."""
    return {
        "run": config.run.name,
        "world_size": world_size,
        "step": {
            "seconds": found.seconds,
            "parts": found.parts(),
            "phases": {name: asdict(phase) for name, phase in found.phases.items()},
            "bubble": found.bubble,
            "tokens": found.tokens,
            "tokens_per_second": found.tokens_per_second,
            "mfu": found.mfu,
        },
        "run_hours": found.hours,
        "gpu_hours": found.gpu_hours,
        "checkpoint": {"bytes": found.checkpoint_bytes, "seconds": found.checkpoint_seconds},
        "memory_of_config": device_memory(config, world_size).total,
        "assumed": asdict(rates),
        "ranks": [_rank_json(step) for step in ranks],
    }


def _rank_json(step: RankStep) -> dict[str, Any]:
    return {
        "rank": step.rank,
        "stage": step.stage,
        "tensor_rank": step.tensor_rank,
        "peaks": {phase: asdict(peak) for phase, peak in step.peaks.items()},
        "flops": {p: sum(w.flops * n for w, n in step.work.items() if w.phase == p) for p in PHASES},
        "kernel_bytes": {p: sum(w.bytes * n for w, n in step.work.items() if w.phase == p) for p in PHASES},
        "launches": dict(step.launches),
        "waits": {f"{wait.place} {wait.kind}": count for wait, count in step.waits.items()},
        "collectives": [
            {
                "phase": message.phase,
                "name": message.name,
                "members": len(message.group),
                "nodes": nodes_of(message.group),
                "place": message.place,
                "count": moved.count,
                "bytes": moved.bytes,
            }
            for message, moved in step.messages.items()
        ],
        "dry_run": {"cpu_seconds": step.seconds, "resident_bytes": step.resident},
    }


def draw(ranks: Sequence[RankStep], found: Estimate, path: Path) -> None:
    """Draw the memory of the fullest rank over a step by kind, and the step's time by part, as a PNG."""
    fullest = max(ranks, key=lambda step: step.peak.bytes)
    figure = new_figure(12.0, 4.5)
    memory, time = figure.subplots(1, 2, width_ratios=(3, 1))
    colours = (*PALETTE, GREY, "#F0E442", "#999933", "#882255", "#DDDDDD")
    kinds = [kind for kind in (*ORDER, *LAST) if any(kind in at.by_kind for at in fullest.instants)]
    heights = [[at.by_kind.get(kind, 0) / 1e9 for at in fullest.instants] for kind in kinds]
    memory.stackplot(range(len(fullest.instants)), heights, labels=kinds, colors=colours, step="post")
    begins = [
        (number, at.phase)
        for number, at in enumerate(fullest.instants)
        if number == 0 or fullest.instants[number - 1].phase != at.phase
    ]
    seen: set[str] = set()
    for number, phase in begins:
        if phase in STEP and phase not in seen:
            seen.add(phase)
            memory.axvline(number, color=GREY, linewidth=0.6)
            memory.text(
                number, memory.get_ylim()[1], f"{phase} ", va="top", ha="right", rotation=90, fontsize=7
            )
    memory.set(
        title=f"Memory of rank {fullest.rank} over a step", ylabel="GB", xlabel="allocations and releases"
    )
    memory.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    bottom = 0.0
    for (name, seconds), colour in zip(found.parts().items(), colours, strict=False):
        time.bar([0], [1e3 * seconds], bottom=[bottom], color=colour, label=f"{name} {1e3 * seconds:,.0f}")
        bottom += 1e3 * seconds
    time.set(title="Time of a step", ylabel="ms", xticks=[])
    time.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    figure.savefig(path, format="png")
