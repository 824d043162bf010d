"""The mix alone, as benchmarked: from router logits to the output, and every gradient back.

All versions run at one shape. Each is compared with plain autograd and with the byte floor, which is the bytes the
mix must move over the memory's bandwidth; measured are times by part, memory and errors. The figure shows the time
of a layer by part beside the floor, and peak memory. Run as a module, it measures the peak memory of one version,
above its inputs, in its own process.

Shapes: N tokens, D width, K blocks, J = K + 1, U distinct types, L layers; lists hold one tensor per layer.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tide_mega.kernels.mix import mix
from tide_mega.kernels.mix.naive import mix as autograd_mix
from tide_mega.kernels.row_gradient import RowGradient
from tide_mega.kernels.token_order import TokenOrder
from tide_mega.lab.bench.measure import Spread, Stopwatch, forget_peak, in_fresh_process, resident, take_turns
from tide_mega.lab.bench.show import floor_marks, new_figure, stacked
from tide_mega.lab.bench.text import draw_ids
from tide_mega.parallel.device import DTYPES


def mix_floor_bytes(
    *, tokens: int, width: int, blocks: int, rows: int, layers: int, element: int
) -> dict[str, int]:
    """Count the bytes of each tensor that must be read or written, once.

    order, once: token rows read (8 N) and kept (4 N), tokens by row (4 N) and where each row begins (4 U) written.

    forward, each layer: router logits (N (K+1) e), residual (N D e), FFN output (N D e), distinct rows (U K D e)
    and token rows (4 N) read; output (N D e) and router weights (4 N (K+1)) written.

    backward, each layer: the output's gradient (N D e), distinct rows again for the weights' gradient (U K D e),
    router weights (4 N (K+1)) and token rows (4 N) read; the logits' gradient (N (K+1) e) written. The
    gradients of residual and FFN output are the output's own: nothing moves.

    row gradient, once: of each layer the output's gradient (L N D e) and router weights (4 L N (K+1)) read,
    with tokens by row (4 N) and where each row begins (4 U); the fp32 sum (4 U K D) written.

    A version may move more (rows evicted from the cache between tokens of one type, temporaries) or, if a tensor
    fits the cache, less.

    Args:
        tokens: of a microbatch.
        width: D.
        blocks: K.
        rows: distinct types of the microbatch.
        layers: that add to one row gradient.
        element: bytes of a value of rows and hidden states (e).
    """
    hidden, board, banks = tokens * width, rows * blocks * width, tokens * (blocks + 1)
    forward = element * (3 * hidden + board + banks) + 4 * (banks + tokens)
    backward = element * (hidden + board + banks) + 4 * (banks + tokens)
    return {
        "order": 16 * tokens + 4 * rows,
        "forward": layers * forward,
        "backward": layers * backward,
        "row gradient": layers * (element * hidden + 4 * banks) + 4 * (tokens + rows + board),
    }


BASELINE = "autograd"
"""Materialises [N, K, D] in each layer; autograd carries gradients to fp32 rows that each layer casts."""
REGIONS = ("order", "forward", "backward", "row gradient")


@dataclass(frozen=True)
class MixCase:
    """One line of the benchmark."""

    tokens: int
    width: int
    blocks: int
    layers: int
    """Layers that contribute to one row gradient."""
    dtype: str
    """bf16 or fp32, of rows and hidden states."""
    distribution: str
    vocab: int


@dataclass
class MixInputs:
    """The inputs that exist before the clock starts."""

    logits_NJ: list[Tensor]
    residual_ND: list[Tensor]
    ffn_ND: list[Tensor]
    grad_ND: list[Tensor]
    """Gradients of the outputs."""
    rows_UKD: Tensor
    wide_UKD: Tensor | None
    """The baseline's fp32 leaf."""
    index_N: Tensor


@dataclass
class MixResults:
    """The results that must exist when the clock stops."""

    out_ND: list[Tensor]
    grad_logits_NJ: list[Tensor]
    grad_rows_UKD: Tensor
    """In fp32, summed over all layers."""


def make_inputs(case: MixCase, version: str, device: torch.device) -> MixInputs:
    """Draw random inputs, the same for every version."""
    torch.manual_seed(0)
    N, D, K, dtype = case.tokens, case.width, case.blocks, DTYPES[case.dtype]
    types_U, index_N = draw_ids(case.distribution, N, case.vocab, seed=0).unique(return_inverse=True)

    def layers(width: int, *, leaf: bool) -> list[Tensor]:
        made = [torch.randn(N, width, device=device).to(dtype) for _ in range(case.layers)]
        return [tensor.requires_grad_(leaf) for tensor in made]

    rows_UKD = torch.randn(types_U.numel(), K, D, device=device).to(dtype)
    return MixInputs(
        layers(K + 1, leaf=True),
        layers(D, leaf=True),
        layers(D, leaf=True),
        layers(D, leaf=False),
        rows_UKD,
        rows_UKD.float().requires_grad_() if version == BASELINE else None,
        index_N.to(device),
    )


def run_mix(inputs: MixInputs, version: str, watch: Stopwatch) -> MixResults:
    """Run forward through all layers, then backward; marks `REGIONS` on the watch.

    Args:
        inputs: of `make_inputs` for the same version.
        version: `BASELINE`, or one of tide_mega.kernels.mix.
        watch: the baseline's row gradient is part of its region backward.
    """
    if version == BASELINE:
        return _autograd(inputs, watch)
    return _deferred(inputs, version, watch)


def exact_results(inputs: MixInputs) -> MixResults:
    """Return what `run_mix` would return without rounding: autograd in fp32, one layer at a time."""
    wide_UKD = inputs.rows_UKD.float().requires_grad_()
    found = MixResults([], [], torch.zeros_like(wide_UKD))
    for layer, grad_ND in enumerate(inputs.grad_ND):
        of_layer = (inputs.logits_NJ[layer], inputs.residual_ND[layer], inputs.ffn_ND[layer])
        logits_NJ, residual_ND, ffn_ND = (tensor.detach().float().requires_grad_() for tensor in of_layer)
        out_ND, _ = autograd_mix(logits_NJ, residual_ND, ffn_ND, wide_UKD, inputs.index_N)
        rows, logits = torch.autograd.grad(out_ND, [wide_UKD, logits_NJ], grad_ND.float())
        found.out_ND.append(out_ND.detach())
        found.grad_logits_NJ.append(logits)
        found.grad_rows_UKD += rows
    return found


def _autograd(inputs: MixInputs, watch: Stopwatch) -> MixResults:
    wide_UKD = inputs.wide_UKD
    assert wide_UKD is not None
    out_ND = [
        autograd_mix(logits, residual, ffn, wide_UKD.to(residual.dtype), inputs.index_N)[0]
        for logits, residual, ffn in zip(inputs.logits_NJ, inputs.residual_ND, inputs.ffn_ND, strict=True)
    ]
    watch.mark("forward")
    leaves = [wide_UKD, *inputs.logits_NJ, *inputs.residual_ND, *inputs.ffn_ND]
    grad_rows_UKD, *rest = torch.autograd.grad(out_ND, leaves, inputs.grad_ND)
    watch.mark("backward")
    return MixResults(out_ND, rest[: len(out_ND)], grad_rows_UKD)


def _deferred(inputs: MixInputs, version: str, watch: Stopwatch) -> MixResults:
    rows_UKD, layers = inputs.rows_UKD, len(inputs.grad_ND)
    order = TokenOrder.sort(inputs.index_N, rows_UKD.size(0))
    watch.mark("order")
    # One layer more than there are, so that the sum waits for `total` and has a region of its own.
    sink = RowGradient(rows_UKD.shape, rows_UKD.device, version, layers + 1)
    out_ND = [
        mix(version, logits, residual, ffn, rows_UKD, order, sink)[0]
        for logits, residual, ffn in zip(inputs.logits_NJ, inputs.residual_ND, inputs.ffn_ND, strict=True)
    ]
    watch.mark("forward")
    leaves = [*inputs.logits_NJ, *inputs.residual_ND, *inputs.ffn_ND]
    gradients = torch.autograd.grad(out_ND, leaves, inputs.grad_ND)
    watch.mark("backward")
    grad_rows_UKD = sink.total()
    watch.mark("row gradient")
    return MixResults(out_ND, list(gradients[:layers]), grad_rows_UKD)


def mix_peak(case: MixCase, version: str, device: torch.device, threads: int) -> int:
    """Return the peak bytes above inputs, results included: CUDA's allocator, or a fresh process (Linux).

    Raises:
        RuntimeError: the process failed.
    """
    if device.type == "cuda":
        return _allocated_peak(case, version, device)
    task = {"case": asdict(case), "version": version, "threads": threads}
    return in_fresh_process("tide_mega.lab.bench.mix", task, threads)["peak"]


def _allocated_peak(case: MixCase, version: str, device: torch.device) -> int:
    inputs = make_inputs(case, version, device)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run_mix(inputs, version, Stopwatch(device))
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del results
    return peak


def _resident_peak(case: MixCase, version: str, threads: int) -> int:
    torch.set_num_threads(threads)
    cpu = torch.device("cpu")
    # Permanent allocations of a first call (threads' stacks, libraries' buffers) are not the mix's.
    tiny = MixCase(**{**asdict(case), "tokens": 64, "layers": 1})
    run_mix(make_inputs(tiny, version, cpu), version, Stopwatch(cpu))
    inputs = make_inputs(case, version, cpu)
    before = resident("VmRSS")
    forget_peak()
    run_mix(inputs, version, Stopwatch(cpu))
    return resident("VmHWM") - before


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
    """Return the largest difference of outputs and gradients, each relative to its tensor's largest magnitude."""
    pairs = [
        *zip(found.out_ND, expected.out_ND, strict=True),
        *zip(found.grad_logits_NJ, expected.grad_logits_NJ, strict=True),
        (found.grad_rows_UKD, expected.grad_rows_UKD),
    ]
    return max(_relative(a.detach().float(), b.detach().float()) for a, b in pairs)


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


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


if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    print(json.dumps({"peak": _resident_peak(MixCase(**task["case"]), task["version"], task["threads"])}))
