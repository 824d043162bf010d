"""The memory's operations timed one by one at the shapes of a step, each beside what the base model does there.

Shapes: N tokens, D width, K blocks, J = K + 1, U rows, L layers; lists hold one tensor a layer.
"""

from collections.abc import Callable
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from tide_mega.bench.mix_case import MixInputs, run_mix
from tide_mega.bench.step_case import StepCase
from tide_mega.bench.timing import Stopwatch, take_turns
from tide_mega.kernels.norm_router import naive, norm_and_route
from tide_mega.kernels.row_gradient import RowGradient
from tide_mega.kernels.token_order import TokenOrder
from tide_mega.memory.plan import MemoryPlan
from tide_mega.model.passes import plan_for

TIMED_LAYERS = 4
"""Layers timed at most, the others being alike: enough for their tensors not to stay in a cache."""


def time_ops(case: StepCase, repeats: int) -> dict[str, float]:
    """Median seconds a step spends in each term of `tide_mega.bench.step_bytes.memory_bytes`, but the optimizer's.

    The mix is timed with the base model's residual sum taken off, and a router that shares the norm's passes with
    the base model's norm taken off. `tables' gradient` is in `norm backward`: one backward pass does both.
    """
    device, microbatches = case.device.torch_device, len(case.batches)
    layers = case.config.model.num_layers
    timed = min(layers, TIMED_LAYERS)
    plan = plan_for(case.stage, case.batches)
    index_N = plan.index_MBT[0].transpose(0, 1).flatten()
    rows_UKD = _read(case, plan).detach()
    inputs = _inputs(case, rows_UKD, index_N, timed)
    version = case.stage.board.kernels.mix
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
    memory, owned = case.stage.memory, case.stage.owned
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
    plan_for(case.stage, case.batches)
    watch.mark("plan")


def _mix(inputs: MixInputs, version: str, watch: Stopwatch) -> None:
    run_mix(inputs, version, watch)


def _residual_sum(inputs: MixInputs, watch: Stopwatch) -> None:
    for residual_ND, ffn_ND in zip(inputs.residual_ND, inputs.ffn_ND, strict=True):
        residual_ND + ffn_ND
    watch.mark("forward")


def _router(inputs: MixInputs, case: StepCase, watch: Stopwatch) -> None:
    """The router alone, or with the norm where it shares that one's passes."""
    layer = case.stage.transformers[0].decoder.layers[0]
    norm, weights = layer.pre_mlp_layernorm, [layer.router_JD]
    if case.router_in_norm:
        version, weights = case.stage.board.kernels.norm_router, [layer.router_JD, norm.weight]
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
    memory, owned = case.stage.memory, case.stage.owned
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
