"""All versions of the mix at one shape: times, memory, results, each against plain autograd and the byte floor."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tide_mega.bench.mix_bytes import mix_floor_bytes
from tide_mega.bench.mix_case import (
    BASELINE,
    DTYPES,
    MixCase,
    MixInputs,
    MixResults,
    exact_results,
    make_inputs,
    run_mix,
)
from tide_mega.bench.mix_peak import mix_peak
from tide_mega.bench.timing import Spread, Stopwatch, take_turns


def measure_mix(
    case: MixCase,
    versions: list[str],
    device: torch.device,
    *,
    repeats: int,
    bandwidth: float,
    peak_threads: int | None,
) -> list[dict[str, Any]]:
    """Return a line for each version, the baseline first.

    Args:
        case: the shape.
        versions: the first must be the baseline.
        device: where to run.
        repeats: timed turns of each.
        bandwidth: bytes per second.
        peak_threads: CPU threads of the processes that measure memory; None leaves memory out.
    """
    inputs = {version: make_inputs(case, version, device) for version in versions}
    rows = inputs[BASELINE].rows_UKD.size(0)
    actions: dict[str, Callable[[Stopwatch], None]] = {
        version: partial(_run, inputs[version], version) for version in versions
    }
    times = take_turns(actions, repeats, device, warmup=2, host_ahead=True)
    exact = exact_results(inputs[BASELINE])
    floor = mix_floor_bytes(
        tokens=case.tokens,
        width=case.width,
        blocks=case.blocks,
        rows=rows,
        layers=case.layers,
        element=DTYPES[case.dtype].itemsize,
    )
    floor_seconds = {region: count / bandwidth for region, count in floor.items()}
    lines: dict[str, dict[str, Any]] = {}
    for version in versions:
        seconds = {region: Spread.of(values) for region, values in times[version].items()}
        line: dict[str, Any] = {**asdict(case), "version": version, "rows": rows}
        line["seconds"] = {region: asdict(spread) for region, spread in seconds.items()}
        line["floor_bytes"], line["floor_seconds"] = floor, floor_seconds
        line["of_floor"] = _of_floor(seconds, floor_seconds)
        line["error"] = _error(run_mix(inputs[version], version, Stopwatch(device)), exact)
        lines[version] = line
        line["times_faster"] = lines[BASELINE]["seconds"]["total"]["median"] / seconds["total"].median
        if peak_threads is not None:
            line["peak"] = mix_peak(case, version, device, peak_threads)
            line["times_less"] = lines[BASELINE]["peak"] / line["peak"]
    return list(lines.values())


def _run(inputs: MixInputs, version: str, watch: Stopwatch) -> None:
    run_mix(inputs, version, watch)


def _of_floor(seconds: dict[str, Spread], floor: dict[str, float]) -> dict[str, float]:
    shares = {region: floor[region] / seconds[region].median for region in floor if region in seconds}
    if "row gradient" not in seconds:
        shares["backward"] = (floor["backward"] + floor["row gradient"]) / seconds["backward"].median
    return {**shares, "total": sum(floor.values()) / seconds["total"].median}


def _error(found: MixResults, expected: MixResults) -> float:
    """Largest difference of outputs and gradients, over the largest magnitude of its tensor."""
    pairs = [
        *zip(found.out_ND, expected.out_ND, strict=True),
        *zip(found.grad_logits_NJ, expected.grad_logits_NJ, strict=True),
        (found.grad_rows_UKD, expected.grad_rows_UKD),
    ]
    return max(_relative(a.detach().float(), b.detach().float()) for a, b in pairs)


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())
