"""Times whole training steps at several K in turns, and attributes the difference to single operations.

The memory's operations are timed one by one at the shapes of a step, each beside its counterpart in the base
model. A round of measurements has all K, or each K with K = 0, or each alone, depending on what fits the GPU. Run
as a module, it measures the peak resident memory of a training process on CPU, in its own process.

Shapes: N tokens, D width, K blocks, J = K + 1, U rows, L layers; lists hold one tensor per layer.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tide_mega.config.device_memory import state_bytes
from tide_mega.config.hydra_door import from_yaml, to_yaml
from tide_mega.config.schema import TideConfig
from tide_mega.config.sizes import flops_per_token
from tide_mega.kernels.norm_router import naive, norm_and_route
from tide_mega.kernels.row_gradient import RowGradient
from tide_mega.kernels.token_order import TokenOrder
from tide_mega.lab.bench.measure import Spread, Stopwatch, forget_peak, in_fresh_process, resident, take_turns
from tide_mega.lab.bench.mix import MixInputs, run_mix
from tide_mega.lab.bench.step_bytes import OPTIMIZER, StepShape, memory_bytes
from tide_mega.lab.bench.step_case import StepCase
from tide_mega.memory.plan import MemoryPlan, plan_rows
from tide_mega.parallel.device import Device, choose_device, set_threads
from tide_mega.parallel.groups import World, start_distributed, stop_distributed

TIMED_LAYERS = 4
"""Most layers timed, since all are alike: enough that their tensors do not stay in a cache."""


def time_ops(case: StepCase, repeats: int) -> dict[str, float]:
    """Return the median seconds per step of each term of `step_bytes.memory_bytes` except the optimizer.

    The base model's residual sum is subtracted from the mix, and its norm from a router that shares the norm's
    passes. `tables' gradient` is part of `norm backward`: one backward pass does both.
    """
    device, microbatches = case.device.torch_device, len(case.batches)
    layers = case.config.model.num_layers
    timed = min(layers, TIMED_LAYERS)
    plan = case.plan()
    index_N = plan.index_MBT[0].transpose(0, 1).flatten()
    rows_UKD = _read(case, plan).detach()
    inputs = _inputs(case, rows_UKD, index_N, timed)
    version = case.stage.memory.kernels.mix
    actions: dict[str, Callable[[Stopwatch], None]] = {
        "plan": partial(_plan, case),
        "router": partial(_router, inputs, case),
        "norm": partial(_norm, inputs, case),
        "mix": partial(_mix, inputs, version),
        "residual sum": partial(_residual_sum, inputs),
        "row gradient": partial(_row_gradient, inputs, version, layers),
        "rows": partial(_rows, case, plan, torch.randn_like(rows_UKD)),
    }
    turns = take_turns(actions, repeats, device, warmup=2, host_ahead=True)
    found = {name: {region: median(values) for region, values in t.items()} for name, t in turns.items()}
    each = microbatches * layers / timed
    router = found["router"]
    if case.router_in_norm:
        router = {region: max(0.0, seconds - found["norm"][region]) for region, seconds in router.items()}
    return {
        "row plan": found["plan"]["plan"] + microbatches * found["mix"].get("order", 0.0),
        "router forward": each * router["forward"],
        "mix forward": each * max(0.0, found["mix"]["forward"] - found["residual sum"]["forward"]),
        "mix backward": each * found["mix"]["backward"],
        "router backward": each * router["backward"],
        "row gradient": microbatches * found["row gradient"]["row gradient"],
        "gather and norm": found["rows"]["forward"],
        "norm backward": found["rows"]["backward"],
    }


def _read(case: StepCase, plan: MemoryPlan) -> Tensor:
    memory, owned = case.stage.memory.blocks, case.stage.memory.owned
    assert memory is not None
    return memory(plan.ids_U, None if owned is None else owned.rows_of(owned.fetch(plan)))


def _inputs(case: StepCase, rows_UKD: Tensor, index_N: Tensor, layers: int) -> MixInputs:
    shapes = {"tokens": index_N.numel(), "banks": rows_UKD.size(1) + 1, "width": rows_UKD.size(2)}

    def made(width: int, *, leaf: bool) -> list[Tensor]:
        like = [rows_UKD.new_empty(shapes["tokens"], width).normal_() for _ in range(layers)]
        return [tensor.requires_grad_(leaf) for tensor in like]

    width = shapes["width"]
    return MixInputs(
        made(shapes["banks"], leaf=True),
        made(width, leaf=True),
        made(width, leaf=True),
        made(width, leaf=False),
        rows_UKD,
        None,
        index_N,
    )


def _plan(case: StepCase, watch: Stopwatch) -> None:
    case.plan()
    watch.mark("plan")


def _mix(inputs: MixInputs, version: str, watch: Stopwatch) -> None:
    run_mix(inputs, version, watch)


def _residual_sum(inputs: MixInputs, watch: Stopwatch) -> None:
    for residual_ND, ffn_ND in zip(inputs.residual_ND, inputs.ffn_ND, strict=True):
        residual_ND + ffn_ND
    watch.mark("forward")


def _router(inputs: MixInputs, case: StepCase, watch: Stopwatch) -> None:
    """The router alone, or with the norm if it shares the norm's passes."""
    layer = case.stage.transformers[0].decoder.layers[0]
    norm, weights = layer.pre_mlp_layernorm, [layer.router_JD]
    if case.router_in_norm:
        version, weights = case.stage.memory.kernels.norm_router, [layer.router_JD, norm.weight]
        outputs = [
            norm_and_route(version, hidden_ND, norm.weight, layer.router_JD, norm.eps)
            for hidden_ND in inputs.residual_ND
        ]
    else:
        outputs = [naive.route(normed_ND, layer.router_JD) for normed_ND in inputs.residual_ND]
    watch.mark("forward")
    gradients = zip(inputs.grad_ND, inputs.logits_NJ, strict=True)
    for leaf_ND, output, (grad_ND, grad_NJ) in zip(inputs.residual_ND, outputs, gradients, strict=True):
        # One layer at a time: each has its own router, so nothing is added up.
        torch.autograd.grad(output, (leaf_ND, *weights), (grad_ND, grad_NJ.detach()))
    watch.mark("backward")


def _norm(inputs: MixInputs, case: StepCase, watch: Stopwatch) -> None:
    """The base model's norm."""
    norm = case.stage.transformers[0].decoder.layers[0].pre_mlp_layernorm
    outputs = [
        F.rms_norm(hidden_ND, norm.weight.shape, norm.weight, norm.eps) for hidden_ND in inputs.residual_ND
    ]
    watch.mark("forward")
    for leaf_ND, output_ND, grad_ND in zip(inputs.residual_ND, outputs, inputs.grad_ND, strict=True):
        torch.autograd.grad(output_ND, (leaf_ND, norm.weight), grad_ND)
    watch.mark("backward")


def _row_gradient(inputs: MixInputs, version: str, layers: int, watch: Stopwatch) -> None:
    order = TokenOrder.sort(inputs.index_N, inputs.rows_UKD.size(0))
    sink = RowGradient(inputs.rows_UKD.shape, inputs.rows_UKD.device, version, layers + 1)
    sink.total()
    for layer in range(layers):
        alpha_NJ = inputs.logits_NJ[layer % len(inputs.logits_NJ)].detach().float()
        sink.add(order, alpha_NJ, inputs.grad_ND[layer % len(inputs.grad_ND)])
    watch.mark("prepared")
    sink.total()
    watch.mark("row gradient")


def _rows(case: StepCase, plan: MemoryPlan, gradient_UKD: Tensor, watch: Stopwatch) -> None:
    memory, owned = case.stage.memory.blocks, case.stage.memory.owned
    assert memory is not None
    if owned is None:
        memory_UKD = memory(plan.ids_U, None)
        watch.mark("forward")
        torch.autograd.grad(memory_UKD, list(memory.parameters()), gradient_UKD)
        watch.mark("backward")
        return
    fetch = owned.fetch(plan)
    rows_UKD = owned.rows_of(fetch).requires_grad_()
    memory_UKD = memory(plan.ids_U, rows_UKD)
    watch.mark("forward")
    grad_UKD, *_ = torch.autograd.grad(memory_UKD, [rows_UKD, *memory.parameters()], gradient_UKD)
    owned.add_gradient(fetch, grad_UKD)
    watch.mark("backward")
    owned.drop_gradient()


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
    """Build every K and let their steps take turns; return one line per K.

    Args:
        configs: by K.
        device: where to run.
        accumulation: microbatches of a step.
        steps: timed steps of each.
        warmup: untimed ones before.
        op_repeats: timed turns of each operation of the breakdown; 0 leaves it out.
        peak_tflops: reference of MFU; None leaves MFU out.
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
        case.stage.memory.owned is not None,
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
    """Add to each line its cost over the line of K = 0, and to lines with `ops` the breakdown.

    `breakdown` has the measured seconds, the floor and their quotient for each term. The optimizer's cost for
    the tables is the difference in that region of the step. What no term explains is `other`: noise, and the
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
    # One backward pass computes both.
    floors["norm backward"] += floors.pop("tables' gradient")
    rows: dict[str, dict[str, float | None]] = {}
    for term, floor in floors.items():
        seconds = measured.get(term)
        share = None if seconds is None or seconds <= 0 else floor / seconds
        rows[term] = {"seconds": seconds, "floor": floor, "of_floor": share}
    explained = sum(measured.values())
    rows["other"] = {"seconds": line["added"]["total"] - explained, "floor": None, "of_floor": None}
    return rows


STEPS = 2
"""The first one allocates permanent buffers."""


def resident_peak(config: TideConfig, accumulation: int, threads: int) -> int:
    """Return the peak bytes above the imports of model, optimizer and steps in a fresh process (Linux).

    Raises:
        RuntimeError: the process failed.
    """
    task = {"config": to_yaml(config), "accumulation": accumulation, "threads": threads}
    return in_fresh_process("tide_mega.lab.bench.step_measure", task, threads)["peak"]


def _measure(task: dict[str, Any]) -> int:
    set_threads(task["threads"], 1)
    device = choose_device("cpu", 0)
    start_distributed(device, World(0, 1, 0, 1), 10)
    before = resident("VmRSS")
    forget_peak()
    case = StepCase(from_yaml(task["config"]), device, task["accumulation"])
    for _ in range(STEPS):
        case.step(Stopwatch(device.torch_device))
    peak = resident("VmHWM") - before
    case.close()
    stop_distributed()
    return peak


STATE_SHARE = 0.8
"""Share of a GPU's memory for weights, gradients and optimizer state; the rest is for one K's activations."""


def fits(configs: list[TideConfig], room: int | None) -> bool:
    """Whether the state of all leaves room for a step of one; true without a limit."""
    return room is None or sum(state_bytes(config, 1) for config in configs) <= STATE_SHARE * room


def plan_rounds(configs: dict[int, TideConfig], room: int | None) -> tuple[list[list[int]], dict[int, str]]:
    """Return the K of each round, and why a K is left out.

    A round with several K is compared within itself. Rounds of a single K come between rounds of K = 0.
    """
    if fits(list(configs.values()), room):
        return [list(configs)], {}
    rounds: list[list[int]] = []
    left_out: dict[int, str] = {}
    for blocks, config in configs.items():
        if blocks and fits([configs[0], config], room):
            rounds.append([0, blocks])
        elif fits([config], room):
            rounds += [[blocks], [0]] if blocks else [[0]]
        else:
            assert room is not None
            left_out[blocks] = (
                f"its weights, gradients and optimizer state need {state_bytes(config, 1) / 1e9:.0f} GB of "
                f"the {STATE_SHARE * room / 1e9:.0f} GB there are for them"
            )
    return rounds, left_out


def measure_rounds(
    configs: dict[int, TideConfig], device: Device, room: int | None, bandwidth: float, **settings: Any
) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """Measure all K that fit; return one line per K, ascending, and why others are left out.

    Args:
        configs: by K, 0 among them.
        device: where to run.
        room: bytes of the GPU's memory; None means no limit.
        bandwidth: bytes per second, for the floors.
        settings: further arguments of `measure_together`.

    Raises:
        RuntimeError: not even K = 0 fits.
    """
    waiting, left_out = plan_rounds(configs, room)
    done: list[list[dict[str, Any]]] = []
    while waiting:
        members = waiting.pop(0)
        try:
            done.append(measure_together({k: configs[k] for k in members}, device, **settings))
        except torch.OutOfMemoryError:
            if members == [0]:
                raise RuntimeError("a step at K=0 runs out of memory: give a smaller micro_batch") from None
            if len(members) == 1:
                left_out[members[0]] = "a step runs out of memory: give a smaller micro_batch"
            else:
                print(f"K={members} run out of memory together: now one by one", file=sys.stderr)
                waiting = [[0], *([k] for k in members if k), [0], *waiting]
    for blocks, reason in left_out.items():
        print(f"K={blocks} is left out: {reason}", file=sys.stderr)
    return _compared(done, bandwidth), left_out


def _compared(rounds: list[list[dict[str, Any]]], bandwidth: float) -> list[dict[str, Any]]:
    """Compare each K with K = 0 of its own round, or with the mean of those before and after; one line each."""
    lines: dict[int, dict[str, Any]] = {}
    bases = [next((line for line in found if line["blocks"] == 0), None) for found in rounds]
    for number, found in enumerate(rounds):
        base = bases[number]
        if base is None:
            before = next(line for line in reversed(bases[:number]) if line is not None)
            after = next((line for line in bases[number:] if line is not None), before)
            base = {**before, "seconds": _mean(before["seconds"], after["seconds"])}
        for line in compare(base, found, bandwidth):
            lines.setdefault(line["blocks"], line)
    return [lines[blocks] for blocks in sorted(lines)]


def _mean(a: dict[str, dict[str, float]], b: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {region: {key: (a[region][key] + b[region][key]) / 2 for key in a[region]} for region in a}


if __name__ == "__main__":
    print(json.dumps({"peak": _measure(json.loads(sys.argv[1]))}))
