"""Whole training steps at several K, taking turns, and what of the difference each operation explains."""

import sys
from dataclasses import asdict
from typing import Any

from tide_mega.bench.step_bytes import OPTIMIZER, StepShape, memory_bytes
from tide_mega.bench.step_case import StepCase
from tide_mega.bench.step_ops import time_ops
from tide_mega.bench.step_peak import resident_peak
from tide_mega.bench.timing import Spread, take_turns
from tide_mega.config.schema import TideConfig
from tide_mega.config.sizes import flops_per_token
from tide_mega.memory.plan import plan_rows
from tide_mega.parallel.device import Device


def measure_together(
    configs: dict[int, TideConfig],
    device: Device,
    *,
    accumulation: int,
    steps: int,
    warmup: int,
    op_repeats: int,
    peak_tflops: float | None,
    peak_threads: int | None,
) -> list[dict[str, Any]]:
    """Build every K and let their steps take turns; returns a line for each.

    Args:
        configs: by K.
        device: where to run.
        accumulation: microbatches of a step.
        steps: timed steps of each.
        warmup: untimed ones before.
        op_repeats: timed turns of each operation of the breakdown; 0 leaves it out.
        peak_tflops: what MFU is a part of; None leaves MFU out.
        peak_threads: CPU threads of the processes that measure memory; None leaves memory out.
    """
    cases: dict[int, StepCase] = {}
    try:
        for blocks, config in configs.items():
            print(f"building K={blocks}", file=sys.stderr)
            cases[blocks] = StepCase(config, device, accumulation)
        print(f"timing K={', '.join(map(str, cases))}", file=sys.stderr)
        turns = take_turns(
            {str(blocks): case.step for blocks, case in cases.items()},
            steps,
            device.torch_device,
            warmup=warmup,
        )
        lines = []
        for blocks, case in cases.items():
            seconds = {region: Spread.of(values) for region, values in turns[str(blocks)].items()}
            line = _line(case, blocks, seconds, peak_tflops)
            if peak_threads is not None:
                line["peak"] = (
                    case.peak_bytes()
                    if device.is_cuda
                    else resident_peak(configs[blocks], accumulation, peak_threads)
                )
            if op_repeats and blocks:
                print(f"timing the operations of K={blocks}", file=sys.stderr)
                line["ops"] = time_ops(case, op_repeats)
            lines.append(line)
    finally:
        for case in cases.values():
            case.close()
    return lines


def _line(
    case: StepCase, blocks: int, seconds: dict[str, Spread], peak_tflops: float | None
) -> dict[str, Any]:
    config = case.config
    tokens = [batch.tokens_BT for batch in case.batches]
    count, step = sum(t.numel() for t in tokens), seconds["total"].median
    shape = StepShape(
        config.model,
        blocks,
        tokens[0].numel(),
        len(tokens),
        tokens[0].unique().numel(),
        plan_rows(tokens).ids_U.numel(),
        2 if config.trainer.precision == "bf16" else 4,
        case.router_in_norm,
        case.stage.owned is not None,
    )
    flops = count * flops_per_token(config.model, config.memory, config.data.seq_length)
    return {
        "blocks": blocks,
        "seconds": {region: asdict(spread) for region, spread in seconds.items()},
        "tokens_per_second": count / step,
        "mfu": None if peak_tflops is None else flops / step / (peak_tflops * 1e12),
        "micro_types": shape.micro_types,
        "step_types": shape.step_types,
        "floor_bytes": memory_bytes(shape),
    }


def compare(base_line: dict[str, Any], lines: list[dict[str, Any]], bandwidth: float) -> list[dict[str, Any]]:
    """Add to each line what it costs above the line of K = 0, and to those with `ops` the breakdown.

    `breakdown` has for each term the seconds measured, the floor and their quotient. What the optimizer's
    tables take is the difference of that region of the step; what no term explains is `other`: noise, and the
    copies that ZeRO's reduction makes of the tables' gradient.
    """
    base = base_line["seconds"]
    for line in lines:
        added = {region: line["seconds"][region]["median"] - base[region]["median"] for region in base}
        line["added"], line["overhead"] = added, added["total"] / base["total"]["median"]
        line["floor_seconds"] = {term: count / bandwidth for term, count in line["floor_bytes"].items()}
        line["floor_overhead"] = sum(line["floor_seconds"].values()) / base["total"]["median"]
        if "ops" in line:
            line["breakdown"] = _breakdown(line)
    return lines


def _breakdown(line: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    measured = {**line["ops"], OPTIMIZER: line["added"]["optimizer"]}
    floors = dict(line["floor_seconds"])
    # One backward pass makes both.
    floors["norm backward"] += floors.pop("tables' gradient")
    rows: dict[str, dict[str, float | None]] = {}
    for term, floor in floors.items():
        seconds = measured.get(term)
        share = None if seconds is None or seconds <= 0 else floor / seconds
        rows[term] = {"seconds": seconds, "floor": floor, "of_floor": share}
    explained = sum(measured.values())
    rows["other"] = {"seconds": line["added"]["total"] - explained, "floor": None, "of_floor": None}
    return rows
